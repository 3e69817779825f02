"""A frozen dataclass is the schema of its config section: keys, types, defaults, help, and every complaint about them.

Supported annotations: bool, int, float, str, `Literal`, `X | None` and other unions, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`,
`dict[str, X]`, and dataclasses of these.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gemma4_jax.errors import UserError, did_you_mean

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """The `cls` that `mapping` describes; keys left out take their defaults.

    Raises:
      UserError: one sentence about an unknown key (with the nearest known one), a missing required key, a value of the wrong
        type, or what `cls.__post_init__` refuses. `where` is the dotted name of the section in these sentences.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} is a section with the keys {', '.join(hints(cls))}; got {mapping!r}.")
    for key in mapping:
        if key not in hints(cls):
            raise unknown_key(cls, str(key), where)
    missing = [key for key in required(cls) if key not in mapping]
    for key in missing:  # a whole section: name the key inside it that is missing
        if dataclasses.is_dataclass(hints(cls)[key]):
            mapping = {**mapping, key: {}}
    missing = [key for key in missing if key not in mapping]
    if missing:
        names = " and ".join(f"{where}.{key}" for key in missing)
        raise UserError(f"{names} must be set, in the config file or with --{where}.{missing[0]}=VALUE.")
    values = {key: coerce(value, hints(cls)[key], f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_mapping(settings: Any) -> dict[str, Any]:
    """The dataclass as nested dicts of JSON values: the inverse of `from_mapping`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(settings))


def default_mapping(cls: type) -> dict[str, Any]:
    """Every key of `cls` that has a default, sections included; required keys are left out."""
    mapping: dict[str, Any] = {}
    for key, annotation in hints(cls).items():
        default = default_of(cls, key)
        if dataclasses.is_dataclass(default):
            mapping[key] = to_mapping(default)
        elif default is not dataclasses.MISSING:
            mapping[key] = default
        elif dataclasses.is_dataclass(annotation):
            mapping[key] = default_mapping(typing.cast(type, annotation))
    return mapping


def hints(cls: Any) -> dict[str, Any]:
    """Key -> annotation, in the order of the fields, string annotations resolved."""
    annotations = typing.get_type_hints(cls)
    return {field.name: annotations[field.name] for field in dataclasses.fields(cls) if field.init}


def default_of(cls: Any, key: str) -> Any:
    """The default value of a field; `dataclasses.MISSING` for a required one."""
    field = field_of(cls, key)
    return field.default_factory() if callable(field.default_factory) else field.default


def field_of(cls: Any, key: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == key)


def required(cls: Any) -> list[str]:
    """The keys of `cls` without a default, sections included."""
    return [key for key in hints(cls) if default_of(cls, key) is dataclasses.MISSING]


def section_of(annotation: Any) -> type | None:
    """The dataclass in an annotation, through `| None`; None when there is none."""
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            return typing.cast(type, member)
    return None


def paths(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted path, owning dataclass, key) of every leaf key below `cls`."""
    for key, annotation in hints(cls).items():
        section = section_of(annotation)
        if section is None:
            yield prefix + key, cls, key
        else:
            yield from paths(section, f"{prefix}{key}.")


def unknown_key(cls: Any, key: str, where: str) -> UserError:
    """The complaint about a key `cls` does not have. A key that stands in a section below is found there."""
    inside = {path.rsplit(".", 1)[-1]: path for path, _, _ in paths(cls)}
    if key in inside:
        return UserError(f"{where} has no key {key!r}; did you mean {where}.{inside[key]}?")
    return UserError(f"{where} has no key {key!r}; {did_you_mean(key, [*hints(cls)])}")


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the type `annotation` asks for. Only lossless changes: int -> float, list -> tuple, mapping -> dataclass."""
    members = _members(annotation)
    if len(members) > 1:
        return _coerce_union(value, members, annotation, where)
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation):
        section = typing.cast(type, annotation)
        return value if isinstance(value, section) else from_mapping(section, value, where)
    if origin is typing.Literal:
        return _coerce_choice(value, typing.get_args(annotation), where)
    if origin in (tuple, list) and isinstance(value, tuple | list):
        return origin(_coerce_items(value, annotation, where))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        item = typing.get_args(annotation)[1]
        return {str(key): coerce(inner, item, f"{where}.{key}") for key, inner in value.items()}
    if annotation is Any:
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or annotation
    if isinstance(value, wanted) and not (wanted in (int, float) and isinstance(value, bool)):
        return value
    raise _wrong_type(value, annotation, where)


def parse(text: str, annotation: Any, where: str) -> Any:
    """The value a command line means by `text`, given the type the key has. `none` is None where the type allows it."""
    members = _members(annotation)
    if type(None) in members and text.lower() == "none":
        return None
    kinds = [member for member in members if member is not type(None)]
    if len(kinds) == 1:
        kind, origin = kinds[0], typing.get_origin(kinds[0])
        if kind is str:
            return text
        if origin is typing.Literal:
            value = next((choice for choice in typing.get_args(kind) if str(choice) == text), text)
            return coerce(value, kind, where)
        if origin in (tuple, list) and text[:1] not in ("(", "["):
            item = typing.get_args(kind)[0]
            return coerce([parse(part.strip(), item, where) for part in text.split(",") if part.strip()], kind, where)
    try:
        return coerce(literal(text), annotation, where)
    except UserError:
        if str in kinds:  # `1,2` is a literal, but to a key that may be text it is text
            return text
        raise


def literal(text: str) -> Any:
    """`text` as a Python literal, with true/false/none in any case; a string when it is none."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def type_name(annotation: Any) -> str:
    """An annotation as a reader of `--help` wants it: `int`, `float32|bfloat16`, `str or none`, `int, ...`."""
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join("none" if member is type(None) else type_name(member) for member in members)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (tuple, list):
        if arguments[-1] is Ellipsis or origin is list:
            return f"{type_name(arguments[0])}, ..."
        return ", ".join(type_name(item) for item in arguments)
    if origin in (dict, Mapping):
        return "key=value"
    return getattr(annotation, "__name__", str(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _coerce_union(value: Any, members: tuple[Any, ...], annotation: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    kinds = [member for member in members if member is not type(None)]
    if len(kinds) == 1 and value is not None:  # X | None: the complaint of X is the precise one
        return coerce(value, kinds[0], where)
    for kind in kinds:
        try:
            return coerce(value, kind, where)
        except UserError:
            continue
    raise _wrong_type(value, annotation, where)


def _coerce_choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    raise UserError(f"{where} is {value!r}; {did_you_mean(str(value), map(str, choices))}")


def _coerce_items(values: Any, annotation: Any, where: str) -> list[Any]:
    kinds = typing.get_args(annotation)
    if kinds[-1] is Ellipsis or typing.get_origin(annotation) is list:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise UserError(f"{where} wants {len(kinds)} values ({type_name(annotation)}), got {len(values)}: {values!r}.")
    return [coerce(value, kind, f"{where}[{i}]") for i, (value, kind) in enumerate(zip(values, kinds, strict=True))]


def _wrong_type(value: Any, annotation: Any, where: str) -> UserError:
    return UserError(f"{where} wants {type_name(annotation)}, got {value!r} ({type(value).__name__}).")

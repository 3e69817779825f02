"""A Python function becomes a tool: its name, signature, type hints and docstring say what the model is told.

    def weather(city: str, days: int = 1) -> str:
        \"""The forecast.

        Args:
            city: where.
            days: how far ahead.
        \"""

Hints may be str, int, float, bool, None, Any, Literal, an Enum, lists, tuples, sets, dicts with str keys, dataclasses, TypedDicts,
unions of these, and Annotated[T, "description"]. A parameter with a default may be left out.
"""

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gemma4_jax.chat_check import check_messages
from gemma4_jax.errors import UserError

SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
SECTION = re.compile(r"\s*(Args|Arguments|Parameters|Returns|Return|Yields|Raises|Examples?|Notes?):\s*$")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function the model may call. Make it with `tool_of`.

    Attributes:
        name: what the model calls it.
        function: what runs.
        declaration: {"type": "function", "function": {"name", "description", "parameters"}}.
        hints: of each parameter, its type.
    """

    name: str
    function: Callable[..., Any]
    declaration: dict[str, Any]
    hints: dict[str, Any]

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Calls the function with a model's JSON arguments, made into what its hints say. Raises what the function raises."""
        given = {name: converted(value, self.hints.get(name, Any)) for name, value in arguments.items()}
        bound = inspect.signature(self.function).bind(**given)
        return self.function(*bound.args, **bound.kwargs)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a tool returns to show images: content parts, {"type": "text", "text": ...} or {"type": "image", ...}.

    Nothing else a tool returns is taken for parts: a page it has fetched could look like one that names a file.
    """

    parts: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        check_messages([{"role": "user", "content": list(self.parts)}])


def tools_of(functions: Iterable[Callable[..., Any] | Tool]) -> dict[str, Tool]:
    """The tools by name. Raises UserError for two of one name, or a function that cannot be a tool."""
    tools: dict[str, Tool] = {}
    for function in functions:
        tool = function if isinstance(function, Tool) else tool_of(function)
        if tool.name in tools:
            raise UserError(
                f"Two tools have the name {tool.name!r}; give one of them another with tool_of(f, name=...)."
            )
        tools[tool.name] = tool
    return tools


def tool_of(function: Callable[..., Any], name: str | None = None) -> Tool:
    """The tool that `function` is. Raises UserError for a parameter without a hint, or with one no JSON schema says."""
    name = name or str(getattr(function, "__name__", ""))
    if not callable(function) or not re.fullmatch(r"[A-Za-z_][\w.\-]*", name):
        raise UserError(f"A tool is a function with a name, got {function!r}; give tool_of(f, name=...).")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"The tool {name} is asynchronous; wrap it in a function that waits for it.")
    hints = _hints(function, name)
    description, notes = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        where = f"The parameter {parameter.name!r} of the tool {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where} cannot be given by name, as a model's call does.")
        if parameter.name not in hints:
            raise UserError(f"{where} has no type hint, so the model cannot be told what it takes.")
        schema = schema_of(hints[parameter.name], where)
        if parameter.name in notes:
            schema.setdefault("description", notes[parameter.name])
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    declared = {"name": name, "description": description, "parameters": parameters}
    return Tool(name, function, {"type": "function", "function": declared}, hints)


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint; `where` begins the UserError for a hint that has none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        text = next((note for note in inner[1:] if isinstance(note, str)), None)
        return schema_of(inner[0], where) | ({"description": text} if text else {})
    if hint is Any or hint is object:
        return {}
    if hint in SIMPLE:
        return {"type": SIMPLE[hint]}
    if origin is typing.Literal or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return _choice([member.value for member in hint] if origin is None else list(inner), where)
    if origin in (typing.Union, types.UnionType):
        return _union(inner, where)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, tuple) and inner and inner[-1] is not Ellipsis:
        given = [schema_of(item, where) for item in inner]
        return {"type": "array", "prefixItems": given, "minItems": len(given), "maxItems": len(given)}
    if typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        return _record(hint, where)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        if inner and inner[0] is not str:
            raise UserError(f"{where} has the type {hint!r}; the keys of JSON are strings.")
        return {"type": "object", "additionalProperties": schema_of(inner[1], where) if inner else True}
    if isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, str | bytes):
        return {"type": "array", "items": schema_of(inner[0], where) if inner else {}}
    raise UserError(f"{where} has the type {hint!r}, which no JSON schema describes; take one of the types of JSON.")


def converted(value: Any, hint: Any) -> Any:
    """A JSON value as its hint says: members of enums, dataclasses, tuples, sets and floats out of what JSON has for them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return converted(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        options = [option for option in inner if _fits(value, option)]
        return converted(value, options[0]) if options else value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Mapping):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            fields = typing.get_type_hints(hint, include_extras=True)
            return hint(**{name: converted(item, fields.get(name, Any)) for name, item in value.items()})
        if len(inner) == 2:
            return {name: converted(item, inner[1]) for name, item in value.items()}
    if isinstance(value, list):
        kind = origin or hint
        several = len(inner) == len(value) and inner[-1:] != (Ellipsis,) and kind is tuple
        items = [converted(item, inner[place if several else 0] if inner else Any) for place, item in enumerate(value)]
        return kind(items) if kind in (tuple, set, frozenset) else items
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the JSON type of a hint, or one of its choices."""
    schema = schema_of(hint, "")
    if "enum" in schema:
        return value in schema["enum"]
    if "type" not in schema:
        return True
    kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None)}
    kind = kinds.get(schema["type"], Mapping if schema["type"] == "object" else list)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        target = function if inspect.isroutine(function) else type(function).__call__
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError) as error:
        raise UserError(f"The type hints of the tool {name} cannot be read ({error}).") from None


def _choice(values: list[Any], where: str) -> dict[str, Any]:
    kinds = {SIMPLE.get(type(value)) for value in values}
    if None in kinds:
        raise UserError(f"{where} is a choice among {values!r}, not all of which JSON has.")
    return {"type": kinds.pop(), "enum": values} if len(kinds) == 1 else {"enum": values}


def _union(hints: tuple[Any, ...], where: str) -> dict[str, Any]:
    """`T | None` is T and nullable, the word the chat format declares; other unions are anyOf."""
    others = [hint for hint in hints if hint is not type(None)]
    if len(others) == 1 and len(hints) == 2:
        schema = schema_of(others[0], where)
        if "enum" in schema:
            return {"anyOf": [schema, {"type": "null"}]}
        return schema | {"nullable": True} if schema else schema
    return {"anyOf": [schema_of(hint, where) for hint in hints]}


def _record(hint: Any, where: str) -> dict[str, Any]:
    """A dataclass or TypedDict."""
    hints = typing.get_type_hints(hint, include_extras=True)
    if dataclasses.is_dataclass(hint):
        empty = dataclasses.MISSING
        required = [f.name for f in dataclasses.fields(hint) if f.default is empty and f.default_factory is empty]
        hints = {f.name: hints[f.name] for f in dataclasses.fields(hint) if f.init}
    else:
        required = [name for name in hints if name in hint.__required_keys__]
    properties = {name: schema_of(inner, f"{where}, field {name!r},") for name, inner in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what stands before the first section, description of each parameter), in Google's style or with `:param name:`."""
    about: list[str] = []
    notes: dict[str, str] = {}
    section, current, indent = "", None, None
    for line in text.splitlines():
        heading = SECTION.match(line)
        param = re.match(r"\s*:param\s+(?:[^:]*\s)?(\w+):\s*(.*)", line)
        if heading or param or re.match(r"\s*:\w+.*:", line):
            section, current, indent = heading[1] if heading else ":param", None, None
            if param:
                current = param[1]
                notes[current] = param[2].strip()
        elif not section:
            about.append(line.strip())
        elif section in ("Args", "Arguments", "Parameters", ":param") and line.strip():
            depth = len(line) - len(line.lstrip())
            entry = re.match(r"\s*\*{0,2}(\w+)(?:\s*\(.*?\))?:\s*(.*)", line)
            indent = depth if indent is None and section != ":param" else indent
            if entry and depth == indent:
                current = entry[1]
                notes[current] = entry[2].strip()
            elif current:
                notes[current] = f"{notes[current]} {line.strip()}".strip()
    return re.sub(r"\n+", "\n", "\n".join(about)).strip(), {name: note for name, note in notes.items() if note}

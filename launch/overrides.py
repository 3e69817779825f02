"""The command line as data: which config file, which keys to replace, typed by the dataclass the key belongs to.

`--config.optim.lr=1e-4`, `--config.optim.lr 1e-4` and, for switches, `--config.train.remat` all work. The type of a value comes
from the schema and never from the value it replaces, so a key that is `none` can be set like any other.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from gemma4_jax.errors import UserError, did_you_mean
from launch import schema

FLAGS = ("--config", "--help", "--debug")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user typed, before any of it is checked against a schema."""

    config: str | None = None
    overrides: tuple[tuple[str, str | None], ...] = ()  # (dotted key, text); None: the key stood alone, a switch
    help: bool = False
    debug: bool = False


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """The arguments after `python -m launch.run`; a UserError names what is not one of them."""
    config, overrides, flags = None, [], set()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--help", "-h", "--debug"):
            flags.add(name)
            continue
        if name != "--config" and not name.startswith("--config."):
            hint = did_you_mean(name, FLAGS)
            raise UserError(f"Unknown argument {argument!r}; {hint}. Keys look like --config.seed=1.")
        text = value if equals else rest.pop(0) if rest and not rest[0].startswith("--") else None
        if name == "--config":
            if not text:
                raise UserError("--config needs a file: --config=configs/NAME.py[:ARG].")
            config = text
        else:
            overrides.append((name.removeprefix("--config."), text))
    return CommandLine(config, tuple(overrides), help=bool(flags & {"--help", "-h"}), debug="--debug" in flags)


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[tuple[str, str | None]], cls: type) -> dict[str, Any]:
    """`mapping` with the command line's values in it; keys and types are those of the dataclass `cls`."""
    for path, text in overrides:
        mapping = _replace(mapping, path.split("."), text, cls, "config")
    return mapping


def _replace(mapping: dict[str, Any], keys: list[str], text: str | None, cls: type, where: str) -> dict[str, Any]:
    key, below = keys[0], keys[1:]
    if key not in schema.hints(cls):
        raise schema.unknown_key(cls, key, where)
    annotation, where = schema.hints(cls)[key], f"{where}.{key}"
    section = schema.section_of(annotation)
    if below and section is not None:
        inner = mapping.get(key)
        if inner is None:  # an optional section comes into being with its first key
            inner = schema.default_mapping(section)
        return {**mapping, key: _replace(inner, below, text, section, where)}
    if below:
        return {**mapping, key: _replace_entry(mapping.get(key), below, text, annotation, where)}
    if text is None:
        if annotation is not bool:
            raise UserError(f"--{where} needs a value ({schema.type_name(annotation)}): --{where}=VALUE.")
        text = "true"
    if section is not None and text.lower() != "none":
        raise UserError(f"{where} is a section; set one of its keys: {', '.join(schema.hints(section))}.")
    return {**mapping, key: schema.parse(text, annotation, where)}


def _replace_entry(entries: Any, keys: list[str], text: str | None, annotation: Any, where: str) -> dict[str, Any]:
    """One entry of a key that is itself a mapping with names of its own, such as `config.model.overrides.vocab_size`."""
    if typing.get_origin(annotation) is not dict:
        kind = schema.type_name(annotation)
        raise UserError(f"{where} is one value ({kind}) and has no key {'.'.join(keys)!r} below it.")
    if text is None:
        raise UserError(f"--{where}.{'.'.join(keys)} needs a value.")
    entries = dict(entries or {})
    if len(keys) > 1:
        inner = dict[str, Any]
        return {**entries, keys[0]: _replace_entry(entries.get(keys[0]), keys[1:], text, inner, f"{where}.{keys[0]}")}
    return {**entries, keys[0]: schema.parse(text, typing.get_args(annotation)[1], f"{where}.{keys[0]}")}

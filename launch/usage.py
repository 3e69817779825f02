"""`--help`, read off the dataclasses: the tasks, what each needs, and every key with type, default and one line."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from launch import schema
from launch.settings import TASKS

USAGE = "python -m launch.run --config=configs/NAME.py[:ARG] [--config.key=value ...] [--help] [--debug]"


def usage(task: str | None = None) -> str:
    """The whole help text, or only what concerns one task."""
    tasks = {name: cls for name, cls in TASKS.items() if task in (None, name)}
    lines = [f"usage: {USAGE}", "", "tasks (config.task):"]
    users: dict[str, list[str]] = {}
    for name, cls in tasks.items():
        lines += _columns(f"  {name}", f"{_claim(cls)} Needs {_needs(cls)}.", 11)
        for key in schema.hints(cls):
            users.setdefault(key, []).append(name)
    owners = {key: tasks[names[0]] for key, names in users.items() if key != "task"}
    sections = {key: schema.section_of(schema.hints(owner)[key]) for key, owner in owners.items()}
    lines += ["", "keys: name, type = default, meaning"]
    for key in (key for key, section in sections.items() if section is None):
        lines += _key(owners[key], key, f"config.{key}", () if task else users[key])
    shown: dict[type, str] = {}  # eval_data has the keys of data: say so instead of repeating them
    for key, section in sections.items():
        if section is None:
            continue
        names = "" if task else f" ({', '.join(users[key])})"
        lines += ["", f"config.{key}: {schema.field_of(owners[key], key).metadata.get('help', '')}{names}"]
        if section in shown:
            lines.append(f"  the same keys as config.{shown[section]}")
            continue
        shown[section] = key
        for path, holder, leaf in schema.paths(section):
            lines += _key(holder, leaf, f"  {path}", ())
    return "\n".join([*lines, "", "With --config=..., --help shows one task. --debug shows the traceback of an error."])


def _key(owner: type, key: str, name: str, users: Sequence[str]) -> list[str]:
    default = schema.default_of(owner, key)
    value = ", required" if default is dataclasses.MISSING else f" = {_show(default)}"
    help = schema.field_of(owner, key).metadata.get("help", "")
    if users and len(users) < len(TASKS):
        help += f" ({', '.join(users)})"
    head = f"{name:<22} {schema.type_name(schema.hints(owner)[key])}{value}"
    return _columns(head, help, 58 if _width() > 100 else 44)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str).lower()


def _needs(cls: type) -> str:
    """The required keys of a task; a section that wants one of several keys names them in its `NEEDS`."""
    names = []
    for key in schema.required(cls):
        section = schema.section_of(schema.hints(cls)[key])
        inside = [*schema.required(section), *getattr(section, "NEEDS", ())] if section else []
        names += [f"config.{key}.{name}" for name in inside] or [f"config.{key}"]
    return ", ".join(names) or "nothing"


def _claim(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _width() -> int:
    return max(80, min(120, shutil.get_terminal_size().columns))


def _columns(head: str, text: str, column: int) -> list[str]:
    """`head`, then `text` folded from `column` on; on the next line where `head` is too long."""
    folded = textwrap.wrap(text, _width() - column, break_on_hyphens=False)
    if len(head) + 2 > column or not folded:
        lines, rest = [head], folded
    else:
        lines, rest = [f"{head:<{column}}{folded[0]}"], folded[1:]
    return [*lines, *(" " * column + line for line in rest)]

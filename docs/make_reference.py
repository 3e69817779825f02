"""Writes docs/reference.md from the docstrings of the public names: `python docs/make_reference.py`."""

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import gemma4_jax

PAGE = Path(__file__).parent / "reference.md"

GROUPS = {  # every public name once, in the order a reader needs them
    "Models": ("ModelConfig", "init", "load", "save_hf", "export"),
    "Text, chats, media": ("Processor", "MediaConfig", "parse_places", "draw_places"),
    "Answers": ("Sampler", "Completion", "load_drafter", "run_agent", "tool_of"),
    "Mistakes": ("UserError",),
}
WIDTH = 110
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def page() -> str:
    """The whole text; public names that are in no group come last."""
    groups = {
        **GROUPS,
        "More": tuple(sorted(set(gemma4_jax.__all__) - {x for names in GROUPS.values() for x in names})),
    }
    lines = [
        "# Reference",
        "",
        "The public names of `import gemma4_jax as g4`, from their docstrings (`python docs/make_reference.py` writes this page).",
        "The launcher's settings stand in `python -m launch.run --help`, those of one task in the same with a `--config`.",
        "",
    ]
    for title, names in groups.items():
        lines += [f"## {title}", ""] if names else []
        for name in names:
            lines += _entry(f"g4.{name}", getattr(gemma4_jax, name), "###")
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any, heading: str) -> list[str]:
    lines = [f"{heading} `{name}`", ""]
    if signature := _signature(name, value):
        lines += ["```text", signature, "```", ""]
    lines += [_text(value), ""]
    if dataclasses.is_dataclass(value):
        bar = "\\|"  # a bare one ends the cell
        types = _types(value)
        fields = [
            (each.name, types.get(each.name, ""), _default(each)) for each in dataclasses.fields(value) if each.init
        ]
        lines += ["| field | type | default |", "|---|---|---|"]
        lines += [f"| `{field}` | `{kind.replace('|', bar)}` | {default} |" for field, kind, default in fields]
        lines.append("")
    if inspect.isclass(value):
        for member, found in sorted(_members(value).items()):
            lines += _entry(f"{name.removeprefix('g4.')}.{member}", found, "####")
    return lines


def _members(cls: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines and says something about."""
    found = {}
    for name, raw in vars(cls).items():
        value = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if (
            not name.startswith("_")
            and (inspect.isfunction(value) or isinstance(raw, property))
            and inspect.getdoc(value)
        ):
            found[name] = value
    return found


def _signature(name: str, value: Any) -> str:
    """As the source spells it, which no version of Python shows differently; "" for what is not called."""
    if inspect.isclass(value):
        value = vars(value).get("__init__") if not dataclasses.is_dataclass(value) else None
    if not inspect.isfunction(value):
        return ""
    found = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(found, ast.FunctionDef)
    shown = _listed(found.args)
    end = "" if found.returns is None or found.name == "__init__" else f" -> {_plain(found.returns)}"
    line = f"{name}({', '.join(shown)}){end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){end}"


def _listed(given: ast.arguments) -> list[str]:
    """Each argument with type and default; `*` where only names are taken from there on."""

    def text(argument: ast.arg, default: ast.expr | None = None) -> str:
        kind = "" if argument.annotation is None else f": {_plain(argument.annotation)}"
        return argument.arg + kind + ("" if default is None else f" = {ast.unparse(default)}")

    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    shown = [text(*each) for each in zip(plain, defaults, strict=True) if each[0].arg not in ("self", "cls")]
    if given.vararg is not None or given.kwonlyargs:
        shown.append("*" + ("" if given.vararg is None else text(given.vararg)))
    shown += [text(*each) for each in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*shown, *([] if given.kwarg is None else ["**" + text(given.kwarg)])]


def _plain(annotation: ast.expr) -> str:
    """A type without the modules its names come from."""
    return re.sub(r"(?<![\w.])(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", ast.unparse(annotation).strip("'\""))


def _types(cls: type) -> dict[str, str]:
    """Field -> type, of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = (each for each in body.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name))
    return {each.target.id: _plain(each.annotation) for each in fields if isinstance(each.target, ast.Name)}


def _value(value: Any) -> str:
    return f"{type(value).__name__}(...)" if dataclasses.is_dataclass(value) or callable(value) else repr(value)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_value(field.default)}`"
    return "required" if field.default_factory is dataclasses.MISSING else "empty"


def _text(value: Any) -> str:
    """The docstring and that of `__init__`; lists of arguments, attributes and errors as lists."""
    parts = [inspect.getdoc(value) or ""]
    if inspect.isclass(value) and "__init__" in vars(value) and not dataclasses.is_dataclass(value):
        parts.append(inspect.getdoc(vars(value)["__init__"]) or "")
    return "\n\n".join(_marked(part) for part in parts if part)


def _marked(doc: str) -> str:
    lines: list[str] = []
    indent: int | None = None  # of the entries of a list; None: not in one
    for line in doc.splitlines():
        depth = len(line) - len(line.lstrip())
        if line.strip() in SECTIONS:
            lines += [f"*{line.strip().rstrip(':')}*", ""]
            indent = 0
        elif indent is not None and depth:
            indent = indent or depth
            lines.append(f"- {line.strip()}" if depth == indent else f"  {line.strip()}")
        else:
            indent = indent if not line.strip() else None
            lines.append(line)
    return "\n".join(lines).strip()


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)

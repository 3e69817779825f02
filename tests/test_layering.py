"""The layout: which module may import which, what stands at the top level, and what stands nowhere."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# Rows from the top down: a package or module of gemma4_jax imports from the rows below its own. Names of one row never import each
# other, except in the rows of COMPANY.
ROWS = (
    ("launch", "configs"),
    ("train", "infer", "eval", "plan"),
    ("checkpoint", "data", "tokenizer", "chat", "processor", "media"),
    ("model",),
    ("quant", "kernels"),
    ("mesh_choice",),
    ("config", "sharding", "chips"),
    ("assets", "options", "errors", "tables"),
)
# Config files use launch.settings; a processor is a tokenizer, a chat format and a media front end; leaves are leaves.
COMPANY = {0, 2, 7}
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}
FOREIGN = {"torch", "transformers", "tensorflow", "qwix", "jinja2"}
SAYS_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
TOP_LEVEL = {
    *("gemma4_jax", "configs", "launch", "tests", "notebooks", "benchmarks", "docs"),
    *(
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "RELIABILITY.md",
        "LICENSE",
    ),
}
SOURCES = sorted(p for root in ("gemma4_jax", "launch", "configs") for p in (PROJECT / root).rglob("*.py"))


def owner(parts: tuple[str, ...]) -> str | None:
    """The name in ROWS a module belongs to; `chat_parse` belongs to `chat`. None for the public `gemma4_jax/__init__.py`."""
    if parts[0] != "gemma4_jax":
        return parts[0]
    name = parts[1] if len(parts) > 1 else "__init__"
    return None if name == "__init__" else name if name in LEVEL else name.partition("_")[0]


def imports(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, dotted name) of everything a file imports, inside functions too; `from a import b` counts as a.b."""
    package = path.relative_to(PROJECT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found += [(node.lineno, (*base, alias.name)) for alias in node.names]
    return found


def complaints(path: Path) -> list[str]:
    """Every import in `path` that points up, sideways, or outside of what the base installation may use."""
    where = path.relative_to(PROJECT)
    mine = owner(where.with_suffix("").parts)
    found = []
    for line, name in imports(path):
        if name[0] in FOREIGN:
            found.append(f"{where}:{line} imports {name[0]}, which is not in the base installation")
        if name[0] not in ("gemma4_jax", "launch", "configs") or mine not in LEVEL:
            continue
        other = owner(name)
        if other == mine:
            continue
        if other not in LEVEL:  # `import gemma4_jax`, or a name of its public surface: everything at once
            if LEVEL[mine] > 0:
                found.append(f"{where}:{line} imports gemma4_jax itself; import the module that has the name")
            continue
        up, sideways = LEVEL[other] < LEVEL[mine], LEVEL[other] == LEVEL[mine] and LEVEL[mine] not in COMPANY
        if up or sideways:
            found.append(f"{where}:{line} ({mine}) imports {'.'.join(name)}, which is {'above' if up else 'beside'} it")
    return found


def test_every_module_has_a_row():
    assert SOURCES, "no sources found"
    owners = {owner(path.relative_to(PROJECT).with_suffix("").parts) for path in SOURCES} - {None}
    assert owners <= LEVEL.keys(), (
        f"give these a row in ROWS, or a home in a package that has one: {owners - LEVEL.keys()}"
    )


def test_imports_point_down():
    found = [complaint for path in SOURCES for complaint in complaints(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("from gemma4_jax.train import loop", 1),
        ("from ..train.loop import x", 1),
        ("def f():\n  import torch", 1),
        ("import gemma4_jax as g4", 1),
        ("from gemma4_jax.kernels import reference\nfrom gemma4_jax import config", 0),
    ],
)
def test_the_check_can_fail(tmp_path, monkeypatch, text, count):
    """A model file with these imports draws that many complaints."""
    monkeypatch.setattr(f"{__name__}.PROJECT", tmp_path)
    path = tmp_path / "gemma4_jax" / "model" / "layer.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(complaints(path)) == count


def test_top_level_layout():
    """Nothing visible stands at the top level but what the design fixed and what builds and runs leave behind."""
    left_behind = {"build", "dist", "runs", "__pycache__", "gemma4_jax.egg-info"}
    found = {path.name for path in PROJECT.iterdir() if not path.name.startswith(".")}
    assert found <= TOP_LEVEL | left_behind


def test_names_say_something():
    vague = [str(p.relative_to(PROJECT)) for p in SOURCES if p.stem in SAYS_NOTHING or p.parent.name in SAYS_NOTHING]
    assert not vague, f"a function with no home is a missing noun: {vague}"


def test_no_unfinished_business():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    texts = [*SOURCES, *(PROJECT / "tests").glob("**/*.py"), *(PROJECT / "benchmarks").glob("**/*.py")]
    found = [f"{p.relative_to(PROJECT)}: {w}" for p in texts for w in words if w in p.read_text()]
    assert not found, found

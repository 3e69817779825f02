"""The notebooks as files: valid, without outputs, one set-up cell, code that parses; `make notebooks` runs them."""

import ast
import json
import re

import pytest
from conftest import PROJECT

BOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def cells(path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_five():
    assert [path.name.partition("_")[0] for path in BOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))
    book = json.loads(path.read_text())
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in book["cells"] if cell["cell_type"] == "code"
    )
    assert path.stat().st_size < 50_000
    code = cells(path, "code")
    assert code[0] == cells(BOOKS[0], "code")[0], "the set-up cell is the same everywhere"
    for text in code:
        ast.parse(text)
    assert re.match(r"# \S", cells(path, "markdown")[0]), "begins with a title"


def test_what_notebooks_need_is_an_extra():
    setup = (PROJECT / "setup.py").read_text()
    assert '"notebooks": [' in setup
    assert "[notebooks]" in cells(BOOKS[0], "code")[0]

"""Every command, snippet, link and number of the documentation: read, dry-run or looked up, so that no page grows stale unseen.

Commands of the launcher are parsed by the launcher up to the point where it would start; scripts of launch/ are dry-run; what
belongs to other programs (gcloud, xpk, pip) is compared with what they have.
"""

import ast
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from test_launch_scripts import FLAGS, check

import gemma4_jax
from gemma4_jax.config import ModelConfig
from gemma4_jax.infer.cache import request_bytes
from gemma4_jax.model.layouts import CacheFormat
from launch.overrides import read_command_line
from launch.run import read_run

PAGES = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "RELIABILITY.md",
    *sorted((PROJECT / "docs").rglob("*.md")),
]
SHELL = {"cd", ".", "touch", "cat", "git", "tensorboard", "kubectl"}
PACKAGES = {"xpk", "xprof", "tensorboard", "jax-rocm7-plugin", "jax-rocm7-pjrt"}
PACKAGES |= {"scikit-learn", "useful-moonshine-onnx"}  # a photograph and a recording lie in their wheels
FLAGS |= {"xpk cluster create": "cluster zone project tpu-type num-slices", "xpk storage attach": ""}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield text


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, in words; bodies of here-documents are not commands."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.DOTALL).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


EVERY = [
    pytest.param(words, id=f"{page.relative_to(PROJECT)}-{number}")
    for page in PAGES
    for number, words in enumerate(words for text in blocks(page, "sh") for words in commands(text))
]


def test_there_are_commands():
    assert len(EVERY) > 60
    assert list(commands("a 'b c' \\\n  d  # e\ncat > f <<'END'\nx\nEND\n")) == [["a", "b c", "d"], ["cat", ">", "f"]]


@pytest.mark.parametrize("words", EVERY)
def test_command(words, monkeypatch):
    monkeypatch.chdir(PROJECT)
    program, rest = words[0], words[1:]
    if Path(program).name in ("python", "python3") and rest[:1] == ["-m"]:
        module(rest[1], rest[2:])
    elif Path(program).name in ("python", "python3"):
        assert (PROJECT / rest[0]).exists()
    elif program.startswith("launch/"):
        script(program, rest)
    elif program == "sbatch":
        assert (PROJECT / rest[0]).exists()
        read_run(read_command_line(rest[1:]))
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (PROJECT / "Makefile").read_text(), re.MULTILINE), f"no target {rest[0]}"
    elif program == "pip":
        packages(rest)
    elif program in ("gcloud", "xpk", "docker"):
        check(words)
    else:
        assert program in SHELL, f"{program} is not among the programs the pages use"


def module(name: str, arguments: list[str]) -> None:
    """`python -m name`: one of ours that is there, or pip and venv."""
    if name == "pip":
        packages(arguments)
    elif name == "launch.run":
        if not any("..." in word for word in arguments) and arguments:
            command = read_command_line(arguments)
            if not command.help:
                read_run(command)
    elif name != "venv":
        assert importlib.util.find_spec(name) is not None, f"no module {name}"


def packages(arguments: list[str]) -> None:
    """What pip installs: this project with extras that exist, or a package a page may name."""
    setup = (PROJECT / "setup.py").read_text()
    for word in arguments[1:]:
        found = re.fullmatch(r"(?:gemma4_jax|\.)(?:\[(.+)\])?", word)
        if found:
            assert all(re.search(rf'"{extra}": \[', setup) for extra in (found[1] or "").split(",") if extra), word
        else:
            assert word.startswith("-") or word in PACKAGES, word


def script(program: str, arguments: list[str]) -> None:
    """A script of launch/ as its dry run; what it hands to the launcher is read like any other command."""
    options, dashes, words = (
        (arguments[: arguments.index("--")], ["--"], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [], [])
    )
    command = ["bash", program, *options, "--dry_run", *dashes, *words]
    done = subprocess.run(command, cwd=PROJECT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if words:
        read_run(read_command_line(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_snippets_and_links(page):
    for text in blocks(page, "python"):
        tree = ast.parse(text)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "g4"
        }
        assert used <= set(gemma4_jax.__all__), f"{page}: g4 has no {used - set(gemma4_jax.__all__)}"
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: no {target}"


def test_readme_is_short_and_leads_to_every_page():
    text = (PROJECT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    index = (
        (PROJECT / "docs" / "README.md").read_text() + (PROJECT / "docs" / "launching" / "README.md").read_text() + text
    )
    unseen = [
        page.name for page in (PROJECT / "docs").rglob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert not unseen, f"no page leads to {unseen}"


def test_every_place_has_a_page_and_a_script_that_is_there():
    table = (PROJECT / "docs" / "launching" / "README.md").read_text()
    named = re.findall(r"`(launch/[\w.]+)`", table)
    assert {"launch/tpu_vm.sh", "launch/gke_jobset.yaml", "launch/slurm.sbatch"} <= set(named)
    assert all((PROJECT / name).exists() for name in named)


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("make_reference", PROJECT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = writer.page()
    assert (PROJECT / "docs" / "reference.md").read_text() == page, (
        "docs/reference.md is old: python docs/make_reference.py"
    )
    assert all(f"`g4.{name}`" in page for name in gemma4_jax.__all__)


def test_the_caches_cost_what_the_page_says():
    rows = re.findall(r"^\| ([\d,]+) \|(.+)\|$", (PROJECT / "docs" / "caches.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == ["8,192", "32,768", "131,072", "262,144"]
    columns = [
        ("e2b", None, "compute"),
        ("e4b", None, "compute"),
        ("26b_a4b", None, "compute"),
        ("31b", None, "compute"),
    ]
    columns += [("31b", "plain", "compute"), ("31b", None, "int8")]
    for length, cells in rows:
        for (variant, layout, storage), cell in zip(columns, cells.split("|"), strict=True):
            cfg, tokens = ModelConfig.variant(variant), int(length.replace(",", ""))
            if tokens > cfg.max_position_embeddings:
                assert not cell.strip()
                continue
            size = request_bytes(cfg, tokens, "bfloat16", CacheFormat.of(cfg, layout, storage)).total  # type: ignore[arg-type]
            assert cell.strip() == f"{size / 2**30:.2f}"


def test_the_table_of_sizes_in_the_architecture():
    rows = re.findall(
        r"^\| (E2B|E4B|26B-A4B|31B) \|(.+)\|$", (PROJECT / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for name, cells in rows:
        cfg = ModelConfig.variant(name.lower().replace("-", "_"))
        layers, own, shared, width, heads, _ = (cell.strip() for cell in cells.split("|"))
        plan = [f"{stack.blocks} x ({stack.sliding} + 1)" for stack in cfg.stacks]
        assert int(layers) == cfg.num_hidden_layers
        assert [own, *([shared.partition(",")[0]] if shared else [])] == plan
        assert int(width.replace(",", "")) == cfg.hidden_size
        assert heads == f"{cfg.num_attention_heads} / {cfg.kv_heads('sliding')}, {cfg.kv_heads('full')}"

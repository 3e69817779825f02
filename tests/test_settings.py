"""The launcher's configuration: dataclasses as schemas, overrides, complaints, help, and every config file in configs/."""

import dataclasses
import json
import re
from typing import Any, Literal

import pytest
from conftest import PROJECT

from gemma4_jax.errors import UserError
from gemma4_jax.options import option
from gemma4_jax.tables import near
from launch import run, schema, settings
from launch.overrides import apply_overrides, read_command_line
from launch.record import keep_config, summary
from launch.usage import usage


@dataclasses.dataclass(frozen=True)
class Optim:
    """A section with one key of every kind."""

    lr: float = option(1e-3, "peak learning rate")
    clip: float | None = option(1.0, "largest gradient norm")
    schedule: Literal["cosine", "linear"] = option("cosine", "after the warm-up")
    betas: tuple[float, float] = option((0.9, 0.95), "of Adam")
    freeze: tuple[str, ...] = option((), "parameters to leave alone")
    remat: bool = option(False, "compute activations twice")

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}.")


@dataclasses.dataclass(frozen=True)
class Data:
    path: str = option(help="rows")
    rows: int | Literal["all"] = option("all", "how many")
    more: str | tuple[str, ...] = option((), "other files")


@dataclasses.dataclass(frozen=True)
class Experiment:
    data: Data = option(help="training rows")
    optim: Optim = option(Optim(), "the optimizer")
    eval_data: Data | None = option(None, "held-out rows")
    overrides: dict[str, Any] = option(factory=dict, help="free names")
    steps: int = option(10, "how long", may_change=True)


def read(mapping: dict[str, Any], *arguments: str) -> Experiment:
    """An Experiment from a config file's mapping and command line arguments."""
    overrides = read_command_line(arguments).overrides
    return schema.from_mapping(Experiment, apply_overrides(mapping, overrides, Experiment))


DATA = {"data": {"path": "x"}}


def test_defaults_and_nesting():
    assert read(DATA) == Experiment(data=Data("x"))
    mapping = {**DATA, "optim": {"lr": 1, "betas": [0.5, 1]}, "eval_data": {"path": "y", "rows": 3}, "steps": 4}
    got = read(mapping)
    assert got == Experiment(Data("x"), Optim(lr=1.0, betas=(0.5, 1.0)), Data("y", 3), steps=4)
    assert isinstance(got.optim.lr, float)
    assert isinstance(got.optim.betas, tuple)


def test_mapping_round_trip():
    got = read({**DATA, "eval_data": {"path": "y"}, "overrides": {"a": {"b": 1}}})
    assert schema.from_mapping(Experiment, json.loads(json.dumps(schema.to_mapping(got)))) == got
    assert schema.from_mapping(Experiment, schema.default_mapping(Experiment) | DATA) == Experiment(Data("x"))


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("--config.optim.lr=1e-4", "optim.lr", 1e-4),
        ("--config.optim.lr=1", "optim.lr", 1.0),
        ("--config.optim.clip=none", "optim.clip", None),
        ("--config.optim.schedule=linear", "optim.schedule", "linear"),
        ("--config.optim.betas=0.8,0.9", "optim.betas", (0.8, 0.9)),
        ("--config.optim.betas=(0.8, 0.9)", "optim.betas", (0.8, 0.9)),
        ("--config.optim.freeze=embed,norm", "optim.freeze", ("embed", "norm")),
        ("--config.optim.freeze=", "optim.freeze", ()),
        ("--config.optim.remat", "optim.remat", True),
        ("--config.optim.remat=false", "optim.remat", False),
        ("--config.data.path=3", "data.path", "3"),
        ("--config.data.rows=3", "data.rows", 3),
        ("--config.data.rows=all", "data.rows", "all"),
        ("--config.data.more=a,b", "data.more", "a,b"),
        ("--config.data.more=1,2", "data.more", "1,2"),
        ("--config.data.more=('a', 'b')", "data.more", ("a", "b")),
        ("--config.eval_data.path=held.jsonl", "eval_data.path", "held.jsonl"),  # makes the optional section
        ("--config.eval_data=none", "eval_data", None),
        ("--config.overrides.vocab_size=512", "overrides", {"vocab_size": 512}),
        ("--config.overrides={'a': 1}", "overrides", {"a": 1}),
        ("--config.steps=1_000", "steps", 1000),
    ],
)
def test_override(argument, path, value):
    got: Any = read(DATA, argument)
    for key in path.split("."):
        got = getattr(got, key)
    assert got == value
    assert type(got) is type(value)


def test_override_with_a_space_and_the_last_one_wins():
    got = read(DATA, "--config.optim.lr", "1e-2", "--config.steps=1", "--config.steps=2", "--config.optim.remat")
    assert (got.optim.lr, got.steps, got.optim.remat) == (1e-2, 2, True)


@pytest.mark.parametrize(
    ("mapping", "arguments", "sentence"),
    [
        (
            DATA,
            ["--config.optim.learning_rate=1"],
            "config.optim has no key 'learning_rate'; known: lr, clip, schedule",
        ),
        (DATA, ["--config.optim.schedul=linear"], "config.optim has no key 'schedul'; did you mean 'schedule'?"),
        (DATA, ["--config.lr=1"], "config has no key 'lr'; did you mean config.optim.lr?"),
        (DATA, ["--config.optimizer.lr=1"], "config has no key 'optimizer'; did you mean 'optim'?"),
        ({**DATA, "optim": {"sched": "linear"}}, [], "config.optim has no key 'sched'; did you mean 'schedule'?"),
        ({}, [], "config.data.path must be set, in the config file or with --config.data.path=VALUE."),
        (DATA, ["--config.eval_data.rows=3"], "config.eval_data.path must be set"),
        (DATA, ["--config.steps=1.5"], "config.steps wants int, got 1.5 (float)."),
        (DATA, ["--config.steps=many"], "config.steps wants int, got 'many' (str)."),
        (DATA, ["--config.steps=true"], "config.steps wants int, got True (bool)."),
        (DATA, ["--config.steps"], "--config.steps needs a value (int)"),
        (DATA, ["--config.optim.remat=1"], "config.optim.remat wants bool, got 1 (int)."),
        (DATA, ["--config.optim.schedule=cosin"], "config.optim.schedule is 'cosin'; did you mean 'cosine'?"),
        (DATA, ["--config.optim.betas=0.9"], "config.optim.betas wants 2 values (float, float), got 1"),
        (DATA, ["--config.optim.betas=0.9,x"], "config.optim.betas wants float, got 'x' (str)."),
        (DATA, ["--config.optim=1"], "config.optim is a section; set one of its keys: lr, clip"),
        (DATA, ["--config.steps.x=1"], "config.steps is one value (int) and has no key 'x' below it."),
        (DATA, ["--config.data.rows=some"], "config.data.rows wants int or all, got 'some' (str)."),
        ({**DATA, "optim": 3}, [], "config.optim is a section with the keys lr"),
        ({**DATA, "optim": {"lr": -1}}, [], "config.optim: lr must be positive, got -1.0."),
        (DATA, ["--confg=x"], "Unknown argument '--confg=x'; did you mean '--config'?"),
        (DATA, ["train"], "Unknown argument 'train'"),
        (DATA, ["--config"], "--config needs a file"),
    ],
)
def test_complaint(mapping, arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        read(mapping, *arguments)
    assert "\n" not in str(caught.value)


def test_task_complaints():
    with pytest.raises(UserError, match=r"config.task is 'sftt'.*did you mean 'sft'\? \(known: sft, qat, "):
        settings.read({"task": "sftt"})
    with pytest.raises(UserError, match=r"config.task must be set; known: sft, qat, "):
        settings.read({})
    with pytest.raises(UserError, match=r"has no key 'quant'"):  # a section the task would ignore
        settings.read({**settings.defaults("sft").to_dict(), "quant": {}})


# What the user has to give, for the config files that need something; the argument after the colon where one is needed.
GIVEN = ["--config.model.path=ckpt", "--config.data.paths=rows.jsonl"]
COMMANDS = {
    "tiny_sft.py": [],
    "tiny_media_sft.py": [],
    "tiny_media_eval.py": [],
    "tiny_media_sample.py": ["--config.prompts.text=Which colour is it?", "--config.prompts.images=a.png"],
    "tiny_qat.py": [],
    "tiny_lora.py": [],
    "tiny_lora.py:w4a16": [],
    "tiny_sample.py": [],
    "tiny_eval.py": [],
    "convert.py:orbax": ["--config.convert.source=a", "--config.convert.target=b"],
    "sft_chat.py:e2b": GIVEN,
    "sft_chat.py:31b": GIVEN,
    "pretrain.py:tiny_e4b": GIVEN[1:],
    "lora.py:e2b": GIVEN,
    "lora.py:31b,w4a16": GIVEN,
    "qat.py:e2b": GIVEN,
    "qat.py:31b,w4a16": GIVEN,
    "qat.py:e4b,mobile": GIVEN,
    "tiny_qat.py:mobile": [],
    "sample.py": ["--config.model.path=ckpt", "--config.prompts.text=hello, you"],
    "eval.py": GIVEN,
    "export.py:gguf": ["--config.export.source=a", "--config.export.path=b"],
    "plan.py:31b": [],
    "gsm8k.py:tiny_e2b": [],
    "gsm8k.py:tiny_26b_a4b": [],
}


def test_every_config_file_is_tried():
    files = {path.name for path in (PROJECT / "configs").glob("*.py")} - {"__init__.py"}
    assert {name.partition(":")[0] for name in COMMANDS} == files


@pytest.mark.parametrize("name", COMMANDS)
def test_config_file(name, monkeypatch):
    """Every key it sets exists and has the right type, and its docstring holds the command that runs it."""
    monkeypatch.chdir(PROJECT)
    command = read_command_line([f"--config=configs/{name}", *COMMANDS[name]])
    got = run.read_run(command)
    assert settings.read(json.loads(json.dumps(schema.to_mapping(got)))) == got
    text = (PROJECT / "configs" / name.partition(":")[0]).read_text()
    assert f"--config=configs/{name.partition(':')[0]}" in text


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """Runs the command with a task that records its settings: (exit code, stdout, stderr, settings)."""
    import sys
    import types

    seen: list[Any] = []
    tasks = types.ModuleType("launch.tasks")
    tasks.TASKS = dict.fromkeys(settings.TASKS, seen.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch.tasks", tasks)
    monkeypatch.chdir(tmp_path)

    def launch(*arguments: str, task=None):
        if task is not None:
            tasks.TASKS["sft"] = task  # type: ignore[attr-defined]
        code = run.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err, seen

    return launch


def test_launch_runs_the_task_and_keeps_the_config(launch, tmp_path):
    arguments = ("--config=configs/tiny_sft.py", "--config.workdir=w", "--config.seed=3")
    code, out, err, seen = launch(*arguments)
    assert (code, err, seen[0].seed) == (0, "", 3)
    assert "model.variant" in out
    kept = json.loads((tmp_path / "w" / "config_sft.json").read_text())
    assert settings.read(kept) == seen[0]
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["config_sft.json"]


def test_launch_refuses_a_directory_with_another_config(launch, tmp_path):
    arguments = ("--config=configs/tiny_sft.py", "--config.workdir=w")
    assert launch(*arguments, "--config.seed=9")[0] == 0  # nothing was saved, so nothing binds
    assert launch(*arguments)[0] == 0
    (tmp_path / "w" / "checkpoints" / "3").mkdir(parents=True)
    code, _, err, seen = launch(*arguments, "--config.seed=7", "--config.model.dtype=bfloat16")
    assert (code, len(seen)) == (1, 2)
    assert "config.seed was 0 and is now 7" in err
    assert "config.model.dtype was 'float32' and is now 'bfloat16'" in err
    assert "data" not in err.replace("eval_data", "")
    assert launch(*arguments)[0] == 0


def test_keys_that_may_change_do_not_stop_a_resume(tmp_path):
    first = settings.read({"task": "convert", "convert": {"source": "a", "target": "b"}, "workdir": str(tmp_path)})
    keep_config(first)
    keep_config(dataclasses.replace(first, seed=5))  # only training resumes
    assert json.loads((tmp_path / "config_convert.json").read_text())["seed"] == 5


def test_launch_turns_a_user_error_into_one_sentence(launch):
    def fail(_):
        raise UserError("The checkpoint directory 'x' is empty.")

    code, _, err, _ = launch("--config=configs/tiny_sft.py", task=fail)
    assert (code, err) == (1, "launch: The checkpoint directory 'x' is empty.\n")
    code, _, err, _ = launch("--config=configs/tiny_sft.py", "--debug", task=fail)
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/nothing.py"], "There is no config file 'configs/nothing.py'; configs/ has convert.py"),
        (["--config=configs/sft_chat.py"], "configs/sft_chat.py needs VARIANT after a colon"),
        (["--config=configs/tiny_sft.py:e2b"], "configs/tiny_sft.py takes nothing after a colon; got 'e2b'."),
        (["--config=configs/sft_chat.py:e2"], "has no sizes for 'e2'; did you mean 'e2b'?"),
        (["--config.seed=1"], "--config.seed changes a config, but there is none"),
        (["--config=configs/tiny_sft.py", "--config.model.variant=tiny_e2"], "tiny_e2"),
        (
            ["--config=configs/tiny_sft.py", "--config.model.path=x"],
            "config.model wants either variant or path, got both",
        ),
        (
            ["--config=configs/sft_chat.py:e2b", "--config.data.paths=x"],
            "config.model wants either variant or path, got neither",
        ),
        (["--config=broken.py"], "broken.py line 3: ZeroDivisionError"),
        (["--config=list.py"], "list.py: get_config() must return a ConfigDict, got list."),
    ],
)
def test_launch_complains_with_code_2(launch, tmp_path, arguments, sentence):
    (tmp_path / "broken.py").write_text("def get_config():\n    x = 0\n    return 1 / x\n")
    (tmp_path / "list.py").write_text("def get_config():\n    return []\n")
    code, out, err, seen = launch(*arguments)
    assert (code, out, seen) == (2, "", [])
    assert sentence in err
    assert err.count("\n") == 1


def test_help_shows_tasks_and_every_key(launch):
    code, out, _, _ = launch()
    assert code == 0
    assert launch("--help")[1] == out
    for task, cls in settings.TASKS.items():
        assert re.search(rf"^  {task} ", out, re.MULTILINE)
        for path, owner, key in schema.paths(cls):
            assert path.rpartition(".")[2] in out
            assert key == "task" or schema.field_of(owner, key).metadata.get("help"), f"{path} has no help text"
    one = launch("--config=configs/tiny_sample.py", "--help")[1]
    assert "config.prompts" in one
    assert "config.optim" not in one
    assert max(map(len, usage().splitlines())) <= 120


def test_summary_shows_only_what_differs():
    got = settings.read({"task": "convert", "convert": {"source": "a", "target": "b", "format": "hf"}})
    assert summary(got).split() == ["convert.source", "a", "convert.target", "b"]


def test_summary_shows_paths_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = settings.read({"task": "convert", "convert": {"source": f"{tmp_path}/a/b", "target": f"{tmp_path}xy/c"}})
    assert summary(got).split() == ["convert.source", "a/b", "convert.target", f"{tmp_path}xy/c"]
    assert near((f"{tmp_path}/d", str(tmp_path), 3)) == ("d", str(tmp_path), 3)


def test_a_plan_reads_no_answers_of_a_teacher():
    mapping = {"task": "plan", "model": {"variant": "e2b"}, "plan": {"step": "qat"}, "quant": {"teacher_cache": "kept"}}
    with pytest.raises(UserError, match=r"quant\.teacher_cache is for training"):
        settings.read(mapping)


def test_a_bucket_is_no_directory():
    with pytest.raises(UserError, match=r"config\.workdir is gs://b/run, but .*mount the bucket"):
        settings.read({"task": "convert", "convert": {"source": "a", "target": "b"}, "workdir": "gs://b/run"})

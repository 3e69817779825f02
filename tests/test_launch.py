"""The launcher's programs end to end on a model of a few thousand weights: train, resume, quantise, answer, convert."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma4_jax import assets
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import Store
from gemma4_jax.model.parameters import arrays
from gemma4_jax.processor import Processor
from gemma4_jax.quant.policy import apply_names, grid_names, snap
from launch.run import main

SIZES = {
    "num_hidden_layers": 10,
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 256,
}
ALONE = "--config.mesh.devices=1"
COMMON = [
    ALONE,
    "--config.data.seq_len=144",
    "--config.data.batch_size=2",
    "--config.eval_data.seq_len=144",
    "--config.eval_data.batch_size=2",
    "--config.train.eval_batches=2",
    "--config.train.log_every=1",
    "--config.optim.warmup_steps=1",
]
SMALL = [f"--config.model.overrides.{key}={value}" for key, value in SIZES.items()]
SFT = ["--config=configs/tiny_sft.py", *COMMON, *SMALL]
QAT = ["--config=configs/tiny_qat.py", *COMMON]


def losses(workdir: Path, name: str = "train/loss") -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Six steps, saved after 3 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "sft"
    options = ["--config.train.steps=6", "--config.train.save_every=3", "--config.train.eval_every=3"]
    assert main([*SFT, *options, "--config.train.sample_every=6", f"--config.workdir={workdir}"]) == 0
    return workdir


def test_training_leaves_metrics_a_config_a_tokenizer_and_checkpoints(trained: Path):
    values = losses(trained)
    assert len(values) == 6
    assert values[-1] < values[0]
    assert len(losses(trained, "eval/loss")) == 2
    assert json.loads((trained / "config_sft.json").read_text())["train"]["steps"] == 6
    assert (trained / "tokenizer.model").read_bytes() == assets.TOKENIZER.read_bytes()
    assert not Processor.load(trained).empty_thought  # it speaks as it was trained: E2B has no empty thought
    with Store(trained / "checkpoints") as store:
        assert store.steps() == [3, 6]


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(trained: Path, tmp_path: Path, capsys):
    """As if the process had died after the checkpoint of step 3, with later lines already in the log."""
    resumed = tmp_path / "sft"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    options = ["--config.train.steps=6", "--config.train.save_every=3", f"--config.workdir={resumed}"]
    assert main([*SFT, *options]) == 0
    assert "resumed after step 3 of 6" in capsys.readouterr().out
    assert [value.hex() for value in losses(resumed)] == [value.hex() for value in losses(trained)]
    with Store(trained / "checkpoints") as a, Store(resumed / "checkpoints") as b:
        like = saved_like(trained)
        first, second = a.restore(6, like)[0], b.restore(6, like)[0]
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def saved_like(workdir: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The form of every array of a run's state, optimizer included."""
    from gemma4_jax.checkpoint.steps import saved_forms, step_directory

    forms = saved_forms(step_directory(workdir))
    assert any(name.startswith("opt.") for name in forms)
    return {name: jax.ShapeDtypeStruct(form.shape, form.dtype) for name, form in forms.items()}


def test_a_directory_with_another_config_is_refused(trained: Path, capsys):
    assert main([*SFT, "--config.train.steps=7", f"--config.workdir={trained}"]) == 1
    message = capsys.readouterr().err
    assert "config.train.steps was 6 and is now 7" in message
    assert len(message.strip().splitlines()) == 1


def test_qat_starts_from_the_float_run_and_answers_as_its_snapped_weights(trained: Path, tmp_path: Path, capsys):
    workdir = tmp_path / "qat"
    options = ["--config.train.steps=2", f"--config.model.path={trained}", f"--config.workdir={workdir}"]
    assert main([*QAT, *options, "--config.quant.grid=int4_sym7_g32"]) == 0
    out = capsys.readouterr().out
    assert "on a grid" in out
    assert "per_layer_embedding" in out
    assert losses(workdir, "train/kl")[0] > 0
    model = load(workdir)
    assert set(grid_names(model).values()) == {"int4_sym7_g32"}
    # Converting writes what the grid holds; rounding it once more changes nothing.
    target = tmp_path / "hf"
    pieces = [f"--config.convert.source={workdir}", f"--config.convert.target={target}"]
    assert main(["--config=configs/convert.py", *pieces, "--config.convert.dtype=float32"]) == 0
    assert (target / "tokenizer.model").exists()
    written = load(target)
    again = snap(apply_names(written, grid_names(model)))
    for name, value in arrays(snap(model)).items():
        np.testing.assert_array_equal(value, arrays(written)[name], err_msg=name)
        np.testing.assert_array_equal(value, arrays(again)[name], err_msg=name)


def test_sampling_and_evaluating_a_run(trained: Path, tmp_path: Path, capsys):
    output = tmp_path / "answers.jsonl"
    options = [f"--config.model.path={trained}", "--config.sample.max_new_tokens=4"]
    assert main(["--config=configs/tiny_sample.py", ALONE, *options, f"--config.prompts.output={output}"]) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(row["tokens"]) <= 4
    assert "tokens/s" in capsys.readouterr().out
    options += ["--config.eval.max_examples=4", "--config.data.batch_size=2", f"--config.workdir={tmp_path}"]
    assert main(["--config=configs/tiny_eval.py", ALONE, *options]) == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    assert results["perplexity"] > 1
    assert 0 <= results["exact_match"] <= 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--config.model.overrides.vocab_size=512"], "The tokenizer has 896 pieces and the model 512"),
        (["--config.data.seq_len=512"], "beyond the model's context of 256"),
        (["--config.optim.freeze=ebmed*"], "matches no parameter"),
        (["--config.data.paths=missing.jsonl"], "missing.jsonl"),
        (["--config.model.variant=none", "--config.model.path=nowhere", "--config.model.overrides={}"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(options: list[str], complaint: str, tmp_path: Path, capsys):
    workdir = tmp_path / "run"
    assert main([*SFT, "--config.train.steps=2", f"--config.workdir={workdir}", *options]) in (1, 2)
    message = capsys.readouterr().err
    assert complaint in message
    assert len(message.strip().splitlines()) == 1
    assert not (workdir / "checkpoints").exists()


def test_rows_that_are_all_bad_are_fatal_and_some_are_counted(tmp_path: Path, capsys):
    good = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
    bad = ['{"messages": [{"role": "robot", "content": "hi"}]}\n', "not json\n"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(bad))
    options = ["--config.train.steps=1", "--config.eval_data=none", f"--config.data.paths={rows}"]
    base = [option for option in SFT if "eval_data" not in option and "warmup" not in option]
    base.append("--config.optim.warmup_steps=0")
    assert main([*base, *options, f"--config.workdir={tmp_path / 'a'}"]) == 1
    assert "row" in capsys.readouterr().err
    rows.write_text("".join([good * 4, *bad]))
    assert main([*base, *options, f"--config.workdir={tmp_path / 'b'}"]) == 0
    out = capsys.readouterr().out
    assert "2 of 6" in out
    kept = [json.loads(line) for line in (tmp_path / "b" / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(row["message"].split("rows.jsonl")[1][:3] for row in kept) == [":5:", ":6:"]
    assert main([*base, *options, "--config.data.max_bad=0.3", f"--config.workdir={tmp_path / 'd'}"]) == 1
    assert "2 of 6 rows cannot be used" in capsys.readouterr().err
    assert main([*base, *options, "--config.data.on_bad_row=error", f"--config.workdir={tmp_path / 'c'}"]) == 1
    assert "rows.jsonl:5" in capsys.readouterr().err

"""`task=qat` from the command line: calibrated, with learned scales, resumed; and a router that stays."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.model.parameters import arrays
from gemma4_jax.model.transformer import init
from gemma4_jax.quant.activations import scales, uncalibrated
from gemma4_jax.quant.policy import described
from launch.run import main

SIZES = dict(hidden_size=64, intermediate_size=64, head_dim=32, global_head_dim=32, sliding_window=16)
DEPTH = {
    "tiny_e2b": dict(num_hidden_layers=10, num_kv_shared_layers=5),
    "tiny_26b_a4b": dict(num_hidden_layers=6, num_experts=4, moe_intermediate_size=32),
}
COMMON = [
    *("--config.mesh.devices=1", "--config.data.seq_len=96", "--config.data.batch_size=2", "--config.eval_data=none"),
    *("--config.train.log_every=1", "--config.optim.warmup_steps=0", "--config.quant.distill_weight=0.0"),
]


def started(name: str, directory: Path) -> Path:
    save_model(init(ModelConfig.variant(name, **SIZES, **DEPTH[name])), directory / "float")
    return directory / "float"


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_mobile_run_calibrates_learns_scales_and_resumes_bit_for_bit(tmp_path: Path, capsys):
    start, whole, cut = started("tiny_e2b", tmp_path), tmp_path / "whole", tmp_path / "cut"
    options = [
        f"--config.model.path={start}",
        "--config.quant.learn_scales=true",
        "--config.quant.calibration_batches=2",
    ]
    command = [
        "--config=configs/tiny_qat.py:mobile",
        *COMMON,
        *options,
        "--config.train.steps=2",
        "--config.train.save_every=1",
    ]
    assert main([*command, f"--config.workdir={whole}"]) == 0
    out = capsys.readouterr().out
    assert "int2_channel" in out
    assert "activations static, keys and values int8" in out
    assert "from 2 batches in" in out
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "2")
    assert main([*command, f"--config.workdir={cut}"]) == 0
    out = capsys.readouterr().out
    assert "resumed after step 1 of 2" in out
    assert "calibrated" not in out
    one, other = load(whole), load(cut)
    assert described(one) == described(other)
    assert described(one)["rounding"] == {"activations": "static", "kv_cache": "int8"}
    assert scales(one)
    assert not uncalibrated(one)
    for name, value in arrays(one).items():
        np.testing.assert_array_equal(value, arrays(other)[name], err_msg=name)
    assert losses(whole)[-1] == losses(cut)[-1]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_router_stays_unless_asked(frozen: bool, tmp_path: Path):
    start, workdir = started("tiny_26b_a4b", tmp_path), tmp_path / "qat"
    options = [f"--config.model.path={start}", f"--config.quant.freeze_router={frozen}", "--config.train.steps=1"]
    assert main(["--config=configs/tiny_qat.py:int8", *COMMON, *options, f"--config.workdir={workdir}"]) == 0
    before, after = arrays(load(start)), arrays(load(workdir))
    moved = {name for name in before if (np.asarray(before[name]) != np.asarray(after[name])).any()}
    assert any(".experts." in name for name in moved)
    assert any(".router." in name for name in moved) != frozen

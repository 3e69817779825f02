"""`task=plan` from the command line: estimates, what does not fit, and what is refused before anything is traced."""

import importlib.util
import json
import math

import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.parameters import variables
from gemma4_jax.model.transformer import abstract
from launch.run import main

PLAN = ["--config=configs/plan.py:31b", "--config.plan.mode=estimate"]


def test_an_estimate_prints_memory_the_roofline_and_a_ranking(capsys, tmp_path):
    path = tmp_path / "plan.json"
    options = ["--config.plan.topology=v6e:8x8", "--config.plan.batch_size=64", "--config.plan.seq_len=8192"]
    assert main([*PLAN, *options, f"--config.plan.output={path}", "--config.plan.parameters=true"]) == 0
    out = capsys.readouterr().out
    assert "head-room" in out
    assert "MFU at most" in out
    assert "meshes and batches that fit, best first" in out
    assert "vocab over fsdp" in out
    attention = [line.split()[:6] for line in out.splitlines() if line.startswith(("sliding ", "full "))]
    assert attention == [
        ["sliding", "256", "8,192", "x", "8,192", "splash"],
        ["full", "512", "8,192", "x", "8,192", "splash"],
    ]
    found = json.loads(path.read_text())
    assert 10 * 2**30 < found["total"] == sum(found["memory"].values()) < 31.25 * 2**30


def test_an_estimate_of_adapters_has_a_base_that_stays(capsys):
    options = ["--config.plan.step=lora", "--config.model.param_dtype=bfloat16", "--config.lora.base=w4a16"]
    assert main([*PLAN, *options, "--config.plan.topology=v6e:2x2", "--config.plan.parameters=true"]) == 0
    out = capsys.readouterr().out
    memory = {
        line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith(("base ", "adapters "))
    }
    assert 30.7 * 0.5 / 4 < memory["base"] < 6 > 20 * memory["adapters"] / 2
    assert "own.full.attention.q.adapter.a" in out
    assert "own.full.attention.q.packed_scale" in out


def test_towers_rest_beside_a_plan_of_text(capsys, tmp_path):
    """What is planned is the text model's step, to the byte, and towers at rest; and it says what is left out."""
    found, options = {}, ["--config.plan.topology=v6e:2x4", "--config.plan.batch_size=8", "--config.plan.seq_len=4096"]
    for seeing in ("false", "true"):
        path = tmp_path / f"{seeing}.json"
        more = [f"--config.model.overrides.multimodal={seeing}", f"--config.plan.output={path}"]
        assert main(["--config=configs/plan.py:e2b", "--config.plan.mode=estimate", *options, *more]) == 0
        found[seeing], out = json.loads(path.read_text()), capsys.readouterr().out
        assert ("is not in this plan, neither its FLOPs nor its memory" in out) == (seeing == "true")
    towers = found["true"]["memory"].pop("towers")
    assert found["true"]["memory"] == found["false"]["memory"]
    assert found["true"]["mfu_bound"] == found["false"]["mfu_bound"]
    whole = abstract(ModelConfig.variant("e2b", multimodal=True))
    beside = [v for name, v in variables(whole).items() if name.startswith(("vision", "audio"))]
    exact = 4 * sum(math.prod(v.shape) for v in beside) / 8
    assert exact < towers < 1.15 * exact, "heads of 64 fill half a tile"


def test_what_does_not_fit_exits_with_1_and_says_what_would(capsys):
    options = ["--config.plan.topology=v5e:4x4", "--config.plan.batch_size=16", "--config.plan.seq_len=8192"]
    assert main([*PLAN, *options]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "GiB a device and v5e:4x4 has 15.75; estimated to fit: " in error
    assert "plan.topology=v5e:" in error


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["plan.topology=v6e:3x3"], 2, "v6e has no topology '3x3'; did you mean"),
        (["plan.topology=v9:2x2"], 2, "Unknown topology 'v9:2x2'; it is a chip and a shape"),
        (["plan.batch_size=15", "plan.grad_accum=2"], 1, "plan.grad_accum=2 does not divide plan.batch_size=15"),
        (["mesh.fsdp=5"], 1, "config.mesh fixes fsdp 5 = 5, which does not divide the 16 devices"),
        (["mesh.fsdp=8", "mesh.data=1", "mesh.context=1"], 1, "has 8 places for 16 devices; the axes must multiply"),
        (["quant.grid=int4_sym7_g32"], 2, "config.quant belongs to plan.step=qat; plan.step=sft does not read it"),
        (
            ["plan.step=decode", "plan.remat=none"],
            2,
            "plan.remat belongs to training; plan.step=decode does not read it",
        ),
        (["lora.base=int8"], 2, "config.lora belongs to plan.step=lora; plan.step=sft does not read it"),
        (["plan.step=lora", "lora.rank=100000"], 1, "lora.rank=100000 is beyond that of own.full.attention.k"),
        (["plan.hlo=x"], 2, "plan.hlo is the text of a compiled program, but plan.mode=estimate compiles none"),
        (["plan.headroom=1.5"], 2, "plan.headroom is a share from 0 up to 1, got 1.5"),
        (["plan.topology=v4:2x2x2", "plan.mode=compile"], 1, "set plan.mode=estimate"),
    ],
)
def test_bad_plans_are_one_sentence(capsys, options, code, sentence):
    assert main([*PLAN, *(f"--config.{option}" for option in options)]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_a_missing_compiler_is_one_sentence(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest)
    )
    assert main(["--config=configs/plan.py:31b"]) == 1
    assert "needs its compiler, libtpu, which is not installed: run pip install 'jax[tpu]==" in capsys.readouterr().err

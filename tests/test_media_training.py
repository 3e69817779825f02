"""Training on pictures and sounds from the command line: what moves and what stays, micro-batches, QAT, and wrong switches."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma4_jax.checkpoint.load import load
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays, is_trainable, variables
from gemma4_jax.model.transformer import abstract, init
from gemma4_jax.quant.policy import QuantConfig, apply, coverage
from gemma4_jax.train.optimizer import OptimConfig
from gemma4_jax.train.parts import left_out, part_of
from gemma4_jax.train.throughput import flops_per_token
from launch.run import main

pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")
pytest.importorskip("soundfile", reason="sounds need soundfile: the extra `media`")

from gemma4_jax.assets import make_media

OVERRIDES = dict(
    layer_period=2, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size=64, intermediate_size=64, head_dim=32,
    global_head_dim=32, sliding_window=16, hidden_size_per_layer_input=8,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _compile_fast() -> Iterator[None]:
    """The tests are nearly all compilation, and none compares bits of different programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("media")
    make_media.main([str(directory), "--pictures=6", "--sounds=4", "--heldout=2"])
    return directory


def trained(drawn: Path, workdir: Path, *more: str, config: str = "tiny_media_sft.py") -> dict[str, np.ndarray]:
    """Arrays of the model that a run leaves behind."""
    sizes = [f"--config.model.overrides.{name}={value}" for name, value in OVERRIDES.items()]
    command = [
        *(f"--config=configs/{config}", f"--config.workdir={workdir}", f"--config.data.paths={drawn}/train.jsonl"),
        *("--config.model.variant=tiny_e2b", "--config.model.overrides.multimodal=true", "--config.eval_data=none"),
        *("--config.mesh.devices=1", "--config.train.log_every=1", "--config.optim.warmup_steps=0"),
        *("--config.optim.weight_decay=0.1", "--config.data.seq_len=192", "--config.data.batch_size=2"),
        *("--config.data.prefetch=0", "--config.media.image_tokens=70", "--config.train.steps=2", *sizes, *more),
    ]
    assert main(command) == 0
    return {name: np.asarray(value) for name, value in arrays(load(workdir)).items()}


def moved(one: dict, other: dict) -> set[str]:
    """Parts with an array that differs."""
    return {part_of(name) for name in one if (np.asarray(one[name]) != np.asarray(other[name])).any()}


def first_step(workdir: Path) -> dict[str, float]:
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    return {name.partition("/")[2]: value for name, value in row.items()}


def of_towers(workdir: Path, trained: dict[str, int] | None) -> float:
    """FLOPs of the first step that are not the decoder's."""
    row, cfg = first_step(workdir), ModelConfig.variant("tiny_e2b", multimodal=True, **OVERRIDES)
    rate = row["flops_per_second"] - row["tokens_per_second"] * flops_per_token(cfg, 192, trained)
    return rate * row["seconds_per_step"]


def test_what_is_not_named_stays_to_the_bit_and_micro_batches_give_the_same_loss(drawn, tmp_path, capsys):
    whole = "--config.optim.train=decoder,vision,audio,projectors"
    everything = trained(drawn, tmp_path / "whole", whole, "--config.train.remat=full")
    after = trained(drawn, tmp_path / "parts", "--config.optim.train=vision,projectors", "--config.train.grad_accum=2")
    start = arrays(init(ModelConfig.variant("tiny_e2b", multimodal=True, **OVERRIDES)))
    out = capsys.readouterr().out
    assert moved(start, everything) == {"decoder", "vision", "audio", "projectors"}
    assert "parts of the model (optim.train=vision,projectors)" in out
    assert "a batch has room for" in out
    assert moved(start, after) == {"vision", "projectors"}
    assert first_step(tmp_path / "parts")["loss"] == pytest.approx(first_step(tmp_path / "whole")["loss"], rel=1e-4)
    # The first batch has pictures alone; where the vision tower and its projector move they make three passes in both runs.
    assert 1e9 < of_towers(tmp_path / "parts", {}) == pytest.approx(of_towers(tmp_path / "whole", None), rel=1e-4)
    steps = [path for path in (tmp_path / "parts" / "checkpoints").iterdir() if path.name.isdigit()]
    names = json.dumps([path.name for path in steps[0].rglob("*")]) + "".join(
        path.read_text(errors="ignore") for path in steps[0].rglob("*") if path.suffix == ".json" or "META" in path.name
    )
    assert "opt." in names
    assert "vision.layers" in names
    assert not any(f"mu.{part}" in names for part in ("own.", "audio.", "embed.")), "no moments of what stays"
    assert "mu.vision." in names


def test_qat_with_pictures_leaves_towers_float_and_as_they_were(drawn, tmp_path, capsys):
    """The default trains the decoder alone; the teacher looks at the same pictures."""
    tiny = trained(drawn, tmp_path / "qat", "--config.model.path=none", config="tiny_qat.py:int8")
    out = capsys.readouterr().out
    assert "towers stay float unless quant.cover names them" in out
    assert "decoder" in out
    model = load(tmp_path / "qat")
    assert model.vision is not None
    assert model.vision.layers.gate.linear.grid is None
    assert model.own.sliding.mlp.gate.grid is not None
    assert {part_of(name) for name in tiny} == {"decoder", "vision", "audio", "projectors"}


def test_parts_by_name():
    whole, text = (abstract(ModelConfig.variant("tiny_e2b", multimodal=seeing)) for seeing in (True, False))
    assert left_out(whole, ("decoder",)) == ("audio.*", "audio_projection.*", "vision.*", "vision_projection.*")
    assert "own.*" in left_out(whole, ("vision", "audio", "projectors"))
    assert left_out(text, ("decoder",)) == ()
    everything = {part_of(name) for name, v in variables(whole).items() if is_trainable(v)}
    assert everything == {"decoder", "vision", "audio", "projectors"}
    with pytest.raises(UserError, match=r"optim.train names 'vision', which this model does not have; known: decoder"):
        left_out(text, ("decoder", "vision"))
    with pytest.raises(UserError, match=r"optim.train has 'visoin', .* did you mean 'vision'"):
        OptimConfig(train=("visoin",))
    with pytest.raises(UserError, match=r"optim\.train is empty"):
        OptimConfig(train=())


@pytest.mark.parametrize("policy", ["q4_0", "w4a16", "int8", "mobile"])
def test_policies_take_models_with_towers(policy):
    model = abstract(ModelConfig.variant("tiny_e2b", multimodal=True))
    config = QuantConfig(policy=policy)
    report = coverage(apply(model, config), config.stays)
    towers = {group.role: group for group in report.groups if group.role in ("vision", "audio", "projector")}
    assert all(group.grid is None and group.parameters and "float" in group.reason for group in towers.values())
    assert len(towers) == 3


def test_a_policy_that_is_told_to_covers_towers():
    model = abstract(ModelConfig.variant("tiny_e2b", multimodal=True))
    config = QuantConfig(policy="q4_0", cover=("attention", "vision", "projector"))
    report = coverage(apply(model, config), config.stays)
    grids = {group.role: group.grid and group.grid.name for group in report.groups if group.arrays}
    assert grids["vision"] == grids["projector"] == grids["attention"] == "q4_0_bf16"
    assert grids["audio"] is None
    with pytest.raises(UserError, match="mobile has no grid"):
        QuantConfig(policy="mobile", cover=("vision",))

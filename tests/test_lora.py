"""Adapters: which weights get them, what they compute, how they are trained, saved, merged and read by others."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax import assets
from gemma4_jax.checkpoint import peft
from gemma4_jax.checkpoint.adapters import Base, base_digest
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.steps import saved_forms, step_directory
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model import lora, packing
from gemma4_jax.model.lora import LoraConfig
from gemma4_jax.model.parameters import arrays, is_trainable, map_arrays, variables, with_arrays
from gemma4_jax.model.transformer import Transformer, abstract, init
from gemma4_jax.quant import policy
from gemma4_jax.sharding import make_mesh, parameter_shardings, place_batch
from gemma4_jax.train.loss import loss_sum
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step
from launch.run import main

MOE = {"vocab_size": 128, "layer_period": 2, "num_hidden_layers": 4, "sliding_window": 16}
E2B = {"vocab_size": 128, "layer_period": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 16}
EVERYTHING = LoraConfig(("all", "router"), rank=4, alpha=6.0)
MESH = {"expert": 2, "fsdp": 2, "tensor": 2}


@cache
def base_model(variant: str = "tiny_26b_a4b") -> Transformer:
    return init(ModelConfig.variant(variant, **(E2B if "e2b" in variant else MOE)), seed=3)


def adapted(model: Transformer, config: LoraConfig = EVERYTHING, size: float = 0.3) -> Transformer:
    """With adapters whose both factors are random: their products are of the size of the weights."""
    model, rng = lora.attach(model, config), np.random.default_rng(5)

    def draw(name, variable):
        shape = variable.get_value().shape
        if lora.MARK not in name:
            return variable.get_value()
        return jnp.asarray(rng.normal(0, size if name.endswith(".b") else 0.2, shape), jnp.float32)

    return map_arrays(draw, model)


def added_by_hand(model: Transformer, scale: float) -> dict[str, np.ndarray]:
    """Every array of the base, W + scale * A B where there is an adapter: in NumPy, from shapes alone."""
    held = {name: np.asarray(value) for name, value in arrays(model).items()}
    out = {name: value for name, value in held.items() if lora.MARK not in name}
    for name in held:
        if not name.endswith(".adapter.a"):
            continue
        path = name.removesuffix(".adapter.a")
        a, b, w = held[name], held[f"{path}.adapter.b"], held[f"{path}.w"]
        rank, count = a.shape[-1], int(np.prod(a.shape[: _stacked(path)]))
        product = a.reshape(count, -1, rank) @ b.reshape(count, rank, -1)
        out[f"{path}.w"] = w + scale * product.reshape(w.shape)
    return out


def _stacked(path: str) -> int:
    """Dims of the stack, by the name."""
    inner = {"own.sliding": 2, "own.full": 1, "shared.sliding": 2, "shared.full": 1}
    return inner.get(".".join(path.split(".")[:2]), 0) + (".experts." in path)


def batch_of(rows: int = 2, length: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 128, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32)[None], (rows, length)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_weights": (rng.random((rows, length)) < 0.5).astype(np.float32),
    }


@quick.jit
def logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def close(a, b, limit: float = 2e-5) -> None:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max())


def test_targets_name_weights_and_every_mistake_is_named():
    model = abstract(base_model().cfg)
    found = lora.matched(model, ("attention", "experts", "down_proj", "own.full.*.router.proj"))
    assert {path.rsplit(".", 1)[-1] for path in found["attention"]} == {"q", "k", "v", "o"}
    assert set(found["experts"]) == {
        f"own.{k}.sparse.experts.{w}" for k in ("sliding", "full") for w in ("gate_up", "down")
    }
    assert set(found["down_proj"]) == {"own.sliding.mlp.down", "own.full.mlp.down"}
    assert found["own.full.*.router.proj"] == ["own.full.sparse.router.proj"]
    assert not any("router" in path for path in lora.matched(model, ("all",))["all"])
    with pytest.raises(UserError, match="did you mean 'experts'"):
        lora.matched(model, ("expert",))
    with pytest.raises(UserError, match="'per_layer', but this model has no such weights; it has all, attention"):
        lora.matched(model, ("per_layer",))
    with pytest.raises(UserError, match=r"lora.rank=99 is beyond that of own\.full"):
        lora.attach(model, LoraConfig(("k_proj",), rank=99))
    with pytest.raises(UserError, match="targets is empty"):
        LoraConfig(())


def test_the_report_counts_what_is_trained():
    model = lora.attach(abstract(base_model().cfg), EVERYTHING)
    table = lora.coverage(model, EVERYTHING).splitlines()
    rows = {tuple(line.split()[:2]): line.split() for line in table[3:]}
    experts = model.cfg.num_experts * model.cfg.num_hidden_layers
    assert rows["experts", "experts.gate_up"][2] == str(experts)
    total = sum(x.size for x in (v.get_value() for v in lora.adapters(model).values()))
    assert table[-1].split()[3] == f"{total:,}"


def test_a_new_adapter_changes_nothing_and_a_random_one_is_a_sum_of_weights():
    """Beside the weight (linear maps), added to it (experts), and merged: NumPy's sum gives the same logits."""
    model, tokens = base_model(), jnp.asarray(batch_of()["tokens"])
    plain = logits(model, tokens)
    fresh = lora.attach(model, EVERYTHING)
    close(logits(fresh, tokens), plain, 1e-6)
    changed = adapted(model)
    by_hand = with_arrays(model, {k: jnp.asarray(v) for k, v in added_by_hand(changed, EVERYTHING.scale).items()})
    wanted = logits(by_hand, tokens)
    assert np.abs(np.asarray(wanted - plain)).max() > 0.1
    close(logits(changed, tokens), wanted)
    merged = lora.merged(changed)
    assert not lora.has_adapters(merged)
    for name, value in arrays(merged).items():
        np.testing.assert_allclose(value, arrays(by_hand)[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def gradients(model: Transformer, batch, remat: str = "none") -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of what moves: adapters, or all of a model without."""
    moving = set(lora.adapters(model)) or {n for n, v in variables(model).items() if n.endswith(".w")}

    def loss(free, rest):
        return loss_sum(with_arrays(model, {**free, **rest}), batch, remat=remat)[0]

    held = arrays(model)
    free = {name: value for name, value in held.items() if name in moving}
    rest = {name: value for name, value in held.items() if name not in moving}
    value, found = quick.jit(jax.value_and_grad(loss))(free, rest)
    return float(value), {name: np.asarray(x) for name, x in found.items()}


@cache
def one_device() -> tuple[float, dict[str, np.ndarray]]:
    return gradients(adapted(base_model()), {k: jnp.asarray(v) for k, v in batch_of(8).items()})


def test_gradients_of_adapters_follow_from_those_of_the_weights():
    """dA = scale * dW B^T and dB = scale * A^T dW, with dW that of the merged model without adapters."""
    model = adapted(base_model())
    merged = lora.merged(model)
    loss, found = one_device()
    wanted_loss, dense = gradients(merged, {k: jnp.asarray(v) for k, v in batch_of(8).items()})
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    held = {name: np.asarray(value, np.float64) for name, value in arrays(model).items()}
    for name in found:
        path, which = name.rsplit(".adapter.", 1)
        a, b = held[f"{path}.adapter.a"], held[f"{path}.adapter.b"]
        lead = int(np.prod(a.shape[: _stacked(path)], dtype=int))
        a, b = a.reshape(lead, -1, EVERYTHING.rank), b.reshape(lead, EVERYTHING.rank, -1)
        dw = dense[f"{path}.w"].reshape(lead, a.shape[1], b.shape[2]).astype(np.float64)
        wanted = dw @ b.swapaxes(1, 2) if which == "a" else a.swapaxes(1, 2) @ dw
        wanted = EVERYTHING.scale * wanted.reshape(found[name].shape)
        assert np.linalg.norm(found[name] - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-7, name


@pytest.mark.parametrize("base", [None, pytest.param("w4a16", marks=pytest.mark.slow)])
def test_adapters_on_a_mesh_are_those_of_one_device(base):
    """Experts, heads, columns and parameters cut over 8 devices, everything recomputed; base as floats or as codes."""
    model = base_model()
    if base is not None:
        model = packing.packed(model, packing.grids_for(model, base))
    model, batch = adapted(model), batch_of(8)
    loss, wanted = one_device() if base is None else gradients(model, {k: jnp.asarray(v) for k, v in batch.items()})
    mesh = make_mesh(MESH)
    place = parameter_shardings(mesh)
    spread = map_arrays(lambda name, v: jax.device_put(v.get_value(), place(name, v)), model)
    q = arrays(spread)["own.full.attention.q.adapter.b"]
    assert q.sharding.shard_shape(q.shape) != q.shape
    with jax.set_mesh(mesh):
        got, found = gradients(spread, place_batch(batch), remat="full")
    assert got == pytest.approx(loss, rel=1e-4)
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) <= 1e-3 * np.linalg.norm(value) + 1e-6, name


def test_on_a_mesh_frozen_weights_get_no_gradient():
    """Counted before any compiler: differentiating by all of a model takes one product more for each of its matrices.

    A barrier over all arrays of a layer (`gathering.gathered`) has a derivative for all: then the difference is 1, the table.
    """
    cfg = ModelConfig.variant("tiny_31b", **MOE)
    model = lora.adapted_shapes(abstract(cfg), LoraConfig(rank=4))
    held = arrays(model)
    trainable = {name for name, v in variables(model).items() if is_trainable(v)}
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(8).items()}

    def products(moving: set[str]) -> int:
        def gradient(free, rest, batch):
            loss = lambda free: loss_sum(with_arrays(model, {**free, **rest}), batch, remat="full")[0]  # noqa: E731
            return jax.grad(loss)(free)

        parts = [{n: x for n, x in held.items() if (n in moving) == moves} for moves in (True, False)]
        return count_products(jax.make_jaxpr(gradient)(*parts, batch).jaxpr)

    with jax.set_mesh(make_mesh({"fsdp": 8})):
        more = products(trainable) - products(set(lora.adapters(model)))
    assert more == sum(name.endswith(".w") for name in trainable)


def count_products(jaxpr: Any) -> int:
    """Matrix products of a traced program, those inside of loops once."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        inner = [getattr(x, "jaxpr", x) for x in inner]
        count += sum(count_products(x) for x in inner if hasattr(x, "eqns"))
    return count


def test_codes_are_the_values_of_their_grid_in_a_quarter_of_the_bytes():
    model = base_model("tiny_e2b")
    grids = packing.grids_for(model, "q4_0")
    packed = packing.packed(model, grids)
    assert packing.packed_names(packed) == grids
    assert "embed.w" not in grids
    snapped = arrays(policy.snap(policy.apply_names(model, grids)))
    decoded = arrays(lora.merged(packed, jnp.float32))
    for path in grids:
        np.testing.assert_array_equal(decoded[f"{path}.w"], snapped[f"{path}.w"], err_msg=path)
        before = arrays(model)[f"{path}.w"].size * 2
        after = sum(arrays(packed)[f"{path}.{name}"].nbytes for name in ("w", "packed_scale"))
        assert after == before * 4.5 / 16, path
    tokens = jnp.asarray(batch_of()["tokens"])
    close(logits(packed, tokens), logits(lora.merged(packed), tokens))


def test_packing_an_adapted_weight_puts_its_adapter_into_the_codes():
    """What sampling with `sample.packed` does to a model that was adapted under QAT."""
    model = policy.apply(
        adapted(base_model("tiny_e2b"), LoraConfig(("all",), rank=4)), policy.QuantConfig(policy="w4a16")
    )
    packed = packing.packed(model, policy.grid_names(model))
    assert not lora.has_adapters(packed)
    merged = arrays(policy.snap(lora.merged(model)))
    for name, value in arrays(lora.merged(packed, jnp.float32)).items():
        assert np.mean(np.asarray(value) != np.asarray(merged[name])) < 1e-3, name


def test_under_qat_the_sum_is_on_the_grid_and_merging_keeps_it_there():
    config = policy.QuantConfig(policy="q4_0")
    model = policy.apply(adapted(base_model(), EVERYTHING), config)
    tokens = jnp.asarray(batch_of()["tokens"])
    merged = lora.merged(model)
    assert policy.grid_names(merged) == policy.grid_names(model)
    close(logits(model, tokens), logits(merged, tokens), 1e-3)  # a sum in another order may round to another code
    held = {k: jnp.asarray(v) for k, v in added_by_hand(model, EVERYTHING.scale).items()}
    by_hand = arrays(policy.snap(policy.apply(with_arrays(base_model(), held), config)))
    snapped = arrays(policy.snap(merged))
    for path in policy.grid_names(model):
        assert np.mean(np.asarray(snapped[f"{path}.w"]) != np.asarray(by_hand[f"{path}.w"])) < 1e-3, path
    assert np.abs(np.asarray(logits(model, tokens) - logits(policy.without(model), tokens))).max() > 1e-2


def test_training_moves_adapters_alone_and_keeps_state_for_them_alone():
    model = adapted(base_model("tiny_31b"), LoraConfig(("all",), rank=4))
    optim = optimizer(OptimConfig(learning_rate=1e-2, weight_decay=0.1), 10)
    before = {name: np.array(value) for name, value in arrays(model).items()}
    state = TrainState.create(model, optim, ())
    assert set(state.params) == set(lora.adapters(model))
    assert not state.frozen
    assert {name.split(".", 1)[0] for name in state.flat()} == {"step", "params", "opt"}
    assert all(lora.MARK in name for name in state.flat() if name.endswith((".a", ".b")))
    batch = {k: jnp.asarray(v) for k, v in batch_of(4).items()}
    _, wanted = gradients(model, batch)
    step = make_train_step(model, optim, grad_accum=2)
    state, metrics = step(state, batch, None)
    assert float(metrics["skipped"]) == 0
    norm = np.sqrt(sum(float(np.sum(x.astype(np.float64) ** 2)) for x in wanted.values())) / float(metrics["tokens"])
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    for name, value in arrays(state.model(model)).items():
        assert (np.array(value) != before[name]).any() == (lora.MARK in name), name


SIZES = {**MOE, "hidden_size": 64, "max_position_embeddings": 256}
RUN = [
    *(
        "--config=configs/tiny_lora.py",
        "--config.mesh.devices=1",
        "--config.data.seq_len=64",
        "--config.data.batch_size=2",
    ),
    *("--config.eval_data=none", "--config.train.log_every=1", "--config.optim.warmup_steps=1"),
    *("--config.lora.targets=attention,mlp,experts", "--config.lora.rank=4", "--config.train.save_every=2"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base in Hugging Face's layout, and a run of four steps beside it, saved after 2 and 4."""
    directory = tmp_path_factory.mktemp("lora")
    cfg = ModelConfig.variant("tiny_26b_a4b", **{**SIZES, "vocab_size": 896})
    save_hf(init(cfg, seed=1), directory / "base", dtype="float32")
    short = [line for line in assets.TRAIN.read_text().splitlines() if '"tools"' not in line][:2]
    (directory / "rows.jsonl").write_text("\n".join(short))  # every step sees the same two
    assert run(directory, "run") == 0
    return directory


def run(directory: Path, name: str, *options: str) -> int:
    where = [f"--config.model.path={directory / 'base'}", f"--config.workdir={directory / name}"]
    return main([*RUN, *where, f"--config.data.paths={directory / 'rows.jsonl'}", "--config.train.steps=4", *options])


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_run_saves_adapters_alone_and_resumes_bit_for_bit(home: Path, capsys):
    forms = saved_forms(step_directory(home / "run"))
    assert all(lora.MARK in name for name in forms if name.startswith(("params.", "frozen.")))
    base = sum(value.size for value in arrays(load(home / "base")).values())
    assert sum(np.prod(form.shape) for form in forms.values()) < base
    assert losses(home / "run")[-1] < losses(home / "run")[0]
    shutil.copytree(home / "run", home / "again")
    shutil.rmtree(home / "again" / "checkpoints" / "4")
    assert run(home, "again") == 0
    out = capsys.readouterr().out
    assert "resumed after step 2 of 4" in out
    assert "adapters of rank 4" in out
    assert losses(home / "again") == losses(home / "run")
    for name, value in arrays(load(home / "run", merge=False)).items():
        np.testing.assert_array_equal(value, arrays(load(home / "again", merge=False))[name], err_msg=name)


def test_a_run_stands_for_the_merged_model_and_refuses_another_base(home: Path, tmp_path: Path, capsys):
    apart, merged = load(home / "run", merge=False), load(home / "run")
    tokens = jnp.asarray(batch_of()["tokens"])
    assert float(jnp.abs(arrays(apart)["own.full.attention.q.adapter.b"]).max()) > 0
    close(logits(apart, tokens), logits(merged, tokens))
    other = tmp_path / "other"
    values = arrays(load(home / "base"))
    values["own.full.attention.q.w"] = values["own.full.attention.q.w"].at[0, 0, 0, 0].add(1e-3)
    save_model(with_arrays(load(home / "base"), values), other)
    with pytest.raises(UserError, match="trained beside other weights"):
        load(home / "run", base=other)
    with pytest.raises(UserError, match="whole model, which has no base"):
        load(home / "base", base=other)
    moved = tmp_path / "moved"
    shutil.copytree(home / "base", moved)
    np.testing.assert_array_equal(logits(load(home / "run", base=moved), tokens), logits(merged, tokens))


def test_exports_are_the_merged_model_or_the_adapters_alone(home: Path, tmp_path: Path, capsys):
    export = [
        "--config=configs/export.py:hf",
        f"--config.export.source={home / 'run'}",
        "--config.export.dtype=float32",
    ]
    assert main([*export, f"--config.export.path={tmp_path / 'merged'}"]) == 0
    assert "merged into their base" in capsys.readouterr().out
    merged = arrays(load(home / "run"))
    for name, value in arrays(load(tmp_path / "merged")).items():
        np.testing.assert_array_equal(value, merged[name], err_msg=name)
    alone = [*export[1:2], f"--config.export.path={tmp_path / 'peft'}"]
    assert main(["--config=configs/export.py:peft", *alone]) == 0
    assert "gate_up_proj" in capsys.readouterr().out
    for name, value in arrays(load(tmp_path / "peft")).items():
        np.testing.assert_array_equal(value, merged[name], err_msg=name)
    assert main(["--config=configs/export.py:peft", f"--config.export.source={home / 'base'}", alone[1] + "2"]) == 1
    assert "format peft is for runs that were trained with config.lora" in capsys.readouterr().err


def test_peft_files_of_a_part_of_the_layers_and_of_other_models(home: Path, tmp_path: Path):
    model = adapted(load(home / "base"), LoraConfig(("experts.down_proj", "q_proj"), rank=2, alpha=3.0, rslora=True))
    config = LoraConfig(("experts.down_proj", "q_proj"), rank=2, alpha=3.0, rslora=True)
    base = Base(str(home / "base"), "float32", False, base_digest(load(home / "base")))
    counts = peft.save_peft(model, tmp_path / "a", config, base)
    assert counts == {"q_proj": 4, "down_proj": 4}
    wanted = arrays(lora.merged(model))
    for name, value in arrays(load(tmp_path / "a")).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-6, atol=1e-7, err_msg=name)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(UserError, match="sets use_dora"):
        load(tmp_path / "a")
    other = abstract(ModelConfig.variant("tiny_26b_a4b", **{**SIZES, "num_hidden_layers": 2}))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="has no place in this model"):
        peft.read_peft(tmp_path / "a", other)


def test_settings_that_contradict_adapters_are_refused(tmp_path: Path, capsys):
    lost = ["--config=configs/tiny_lora.py", "--config.model.path=none", "--config.model.variant=tiny_e2b"]
    assert main(lost) == 2
    assert "config.lora trains adapters of a checkpoint" in capsys.readouterr().err
    scales = ["--config=configs/tiny_qat.py", "--config.lora.rank=4", "--config.quant.learn_scales=true"]
    assert main(scales) == 2
    assert "learn_scales" in capsys.readouterr().err


@pytest.mark.slow
def test_qlora_under_qat_runs_and_its_merge_is_on_the_grid(home: Path, capsys):
    options = ["--config.lora.base=w4a16", "--config.train.steps=2"]
    where = [f"--config.model.path={home / 'base'}", f"--config.workdir={home / 'qlora'}"]
    qat = ["--config=configs/tiny_qat.py:w4a16", *RUN[1:], *where, *options, "--config.quant.distill_weight=0.5"]
    assert main(qat) == 0
    assert "base held as" in capsys.readouterr().out
    model = load(home / "qlora")
    assert set(policy.grid_names(model).values()) == {"int4_sym7_g32"}
    apart = load(home / "qlora", merge=False)
    tokens = jnp.asarray(batch_of()["tokens"])
    close(logits(apart, tokens), logits(model, tokens), 1e-3)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_transformers_and_peft_compute_the_same_logits(home: Path, tmp_path: Path):
    """Base and adapters loaded by them, applied and merged by them, against ours; experts included."""
    config = LoraConfig(("all", "router"), rank=4, alpha=6.0)
    model = adapted(load(home / "base"), config)
    peft.save_peft(model, tmp_path / "peft", config, Base(str(home / "base"), "float32", False, ""))
    tokens = np.random.default_rng(3).integers(3, 896, (2, 24))
    np.savez(tmp_path / "in.npz", tokens=tokens)
    script = Path(__file__).parent / "golden" / "live_peft.py"
    command = [sys.executable, str(script), str(home / "base"), str(tmp_path / "peft"), str(tmp_path / "in.npz")]
    subprocess.run([*command, str(tmp_path / "out.npz")], check=True)
    ours = np.asarray(logits(model, jnp.asarray(tokens, jnp.int32)))
    with np.load(tmp_path / "out.npz") as theirs:
        assert np.abs(theirs["applied"] - ours).max() <= 1e-3
        assert np.abs(theirs["merged"] - ours).max() <= 1e-3
        assert np.abs(theirs["base"] - ours).max() > 0.1

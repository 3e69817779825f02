"""Training: what moves, what decays, micro-batches, the log line, and what a step costs in memory."""

import functools
import json
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model import lora
from gemma4_jax.model.lora import LoraConfig
from gemma4_jax.model.parameters import arrays, is_trainable, map_arrays, variables
from gemma4_jax.model.transformer import Transformer, abstract, init
from gemma4_jax.train.metrics import Meter, duration, si
from gemma4_jax.train.optimizer import OptimConfig, decays, optimizer, schedule, trainable_names
from gemma4_jax.train.recorder import Recorder
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step
from gemma4_jax.train.throughput import flops_per_token

SMALL = dict(vocab_size=128, hidden_size=64, head_dim=16, global_head_dim=32, sliding_window=16)


def small(variant: str = "tiny_31b") -> Transformer:
    """The structure that compiles fastest; what differs between structures is compared in test_golden.py."""
    return init(ModelConfig.variant(variant, **SMALL), seed=3)


def batch_of(rows: int = 4, length: int = 24, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 128, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "loss_weights": jnp.asarray(rng.random((rows, length)) < 0.4, jnp.float32),
    }


def after_one_step(model: Transformer, config: OptimConfig, **options) -> tuple[TrainState, dict]:
    optim = optimizer(config, 10)
    step = make_train_step(model, optim, **options)
    return step(TrainState.create(model, optim, config.freeze), batch_of(), None)


@pytest.mark.parametrize(
    ("variant", "remat", "freeze"),
    [
        ("tiny_31b", "full", ()),
        ("tiny_e2b", "none", ("own.full.*", "embed*")),
        ("tiny_26b_a4b", "full", ("own.sliding.*",)),
    ],
)
def test_micro_batches_change_nothing(variant, remat, freeze):
    """Of layers that own keys and values, that share them, and of experts; with some of them frozen."""
    model, config = small(variant), OptimConfig(learning_rate=1e-3, freeze=freeze)
    whole, a = after_one_step(model, config, remat=remat)
    parts, b = after_one_step(model, config, grad_accum=4, remat=remat)
    for name in ("loss", "tokens", "slots", "grad_norm", "accuracy"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name
    # Adam's first step is the sign of the gradient: compare moments, which are linear in it.
    moments = lambda state: {k: v for k, v in state.flat().items() if ".mu." in k}  # noqa: E731
    for name, value in moments(whole).items():
        other = moments(parts)[name]
        assert np.linalg.norm(value - other) <= 1e-4 * np.linalg.norm(value) + 1e-12, name


def test_updates_that_are_not_finite_or_too_large_change_nothing_but_the_step():
    model, config = small(), OptimConfig(learning_rate=1e-3)
    optim = optimizer(config, 10)
    good = batch_of()
    bad = {**good, "loss_weights": good["loss_weights"].at[1, 3].set(jnp.inf)}
    step = make_train_step(model, optim)
    state, metrics = step(TrainState.create(model, optim, config.freeze), good, None)
    assert float(metrics["skipped"]) == 0.0
    before = {name: np.asarray(value) for name, value in state.flat().items()}
    state, metrics = step(state, bad, None)
    assert float(metrics["skipped"]) == 1.0
    assert not np.isfinite(float(metrics["loss"]))
    for name, value in state.flat().items():
        if name == "step":
            assert int(value) == 2
        else:
            np.testing.assert_array_equal(np.asarray(value), before[name], err_msg=name)
    state, metrics = step(state, good, None)
    assert float(metrics["skipped"]) == 0.0
    assert any((np.asarray(value) != before[name]).any() for name, value in state.flat().items() if name != "step")
    careful = make_train_step(model, optim, skip_above=float(metrics["grad_norm"]) / 2)
    assert float(careful(state, good, None)[1]["skipped"]) == 1.0


def test_micro_batches_hold_the_gradients_of_layers_once():
    """Of 24 layers the accumulating step takes 1.12 times their gradients, and 2.12 times where they are not tallied."""
    model = abstract(ModelConfig.variant("tiny_31b", **{**SMALL, "layer_period": 2, "num_hidden_layers": 24}))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = map_arrays(lambda _, v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where), model)
    still = optax.set_to_zero()  # an optimizer's own memory comes after it, and is more on a CPU
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(2, 16).items()}
    lowered = make_train_step(model, still, grad_accum=2, remat="full").lower(  # pyright: ignore[reportFunctionMemberAccess]
        TrainState.abstract(model, still, ()), batch, None
    )
    memory = lowered.compile(quick.OPTIONS).memory_analysis()
    layers = sum(4 * x.size for name, x in arrays(model).items() if name.startswith("own."))
    assert memory.temp_size_in_bytes < 1.5 * layers


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(UserError, match="grad_accum=3 does not divide"):
        after_one_step(small(), OptimConfig(), grad_accum=3)


def test_buffers_and_frozen_parameters_stay_and_have_no_optimizer_state():
    model = small()
    config = OptimConfig(learning_rate=1e-2, freeze=("embed*", "own.full.*"))
    state, _ = after_one_step(model, config)
    before = arrays(model)
    for name, value in arrays(state.model(model)).items():
        still = name.startswith(("embed", "own.full.")) or name.endswith("layer_scalar")
        assert bool((value == before[name]).all()) == still, name
    assert not [name for name in state.flat() if name.startswith("opt.") and "own.full" in name]


def test_freeze_patterns_that_match_nothing_or_everything_are_errors():
    model = abstract(ModelConfig.variant("tiny_e2b"))
    with pytest.raises(UserError, match="'ebmed\\*' matches no parameter"):
        trainable_names(model, ["ebmed*"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        trainable_names(model, ["*"])


def test_only_matrices_decay():
    model = small()
    names = trainable_names(model, ())
    decaying = {name for name in names if decays(name)}
    assert "own.sliding.attention.q.w" in decaying
    assert not any("norm" in name or name in ("embed.w", "per_layer.table.w") for name in decaying)
    # And the optimizer really goes by it: with a zero gradient only decaying parameters move.
    optim = optimizer(OptimConfig(weight_decay=0.1, learning_rate=1e-2), 10)
    params = {name: value for name, value in arrays(model).items() if name in names}
    with jax.numpy_dtype_promotion("standard"):
        still = jax.jit(lambda p: optim.update(jax.tree.map(jnp.zeros_like, p), optim.init(p), p)[0])
        updates = still(params)
    moved = {name for name, update in cast(dict[str, jax.Array], updates).items() if bool(jnp.any(update != 0))}
    assert moved == decaying


def test_schedules():
    config = OptimConfig(learning_rate=1.0, warmup_steps=4, end_factor=0.1)
    rate = schedule(config, 14)
    assert [float(jnp.asarray(rate(i))) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(jnp.asarray(rate(14))) == pytest.approx(0.1)
    with pytest.raises(UserError, match="leaves none"):
        schedule(config, 4)


def test_a_batch_without_trained_tokens_moves_nothing():
    model = small()
    optim = optimizer(OptimConfig(learning_rate=1e-2), 10)
    batch = {**batch_of(), "loss_weights": jnp.zeros((4, 24), jnp.float32)}
    state, metrics = make_train_step(model, optim)(TrainState.create(model, optim, ()), batch, None)
    assert float(metrics["loss"]) == 0.0
    for name, value in arrays(state.model(model)).items():
        np.testing.assert_array_equal(value, arrays(model)[name], err_msg=name)


def test_distillation_from_itself_is_zero_and_from_another_is_not():
    model, other = small(), init(ModelConfig.variant("tiny_31b", **SMALL), seed=9)
    optim = optax.sgd(0.0)
    for reverse in (False, True):
        step = make_train_step(model, optim, distill_weight=1.0, reverse_kl=reverse)
        _, same = step(TrainState.create(model, optim, ()), batch_of(), model)
        _, different = step(TrainState.create(model, optim, ()), batch_of(), other)
        assert abs(float(same["kl"])) < 1e-5
        assert float(different["kl"]) > 0.01
        assert float(different["loss"]) == pytest.approx(float(different["kl"]))


@pytest.mark.parametrize("committed", [False, True])
def test_the_step_compiles_once(committed: bool):
    """Also from weights that were read onto a device, whose arrays jit treats as another kind of input."""
    model, optim = small(), optimizer(OptimConfig(), 10)
    if committed:
        model = jax.device_put(model, jax.devices()[0])
    step = make_train_step(model, optim)
    state = TrainState.create(model, optim, (), copy=False)
    for seed in range(3):
        state, _ = step(state, batch_of(seed=seed), None)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # a jitted function, typed as callable


def test_state_survives_its_flat_form():
    model, optim = small(), optimizer(OptimConfig(), 10)
    state = TrainState.create(model, optim, ("embed*",))
    again = state.with_flat({name: np.asarray(value) for name, value in state.flat().items()})
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


def test_model_flops():
    """Without sparsity a forward pass is 2 FLOPs a matrix weight and token, and attention is little at a short length."""
    cfg = ModelConfig.variant("tiny_31b", vocab_size=512)
    weights = sum(value.size for name, value in arrays(abstract(cfg)).items() if name.endswith(".w"))
    forward = flops_per_token(cfg, 32) / 3
    assert 2 * weights < forward < 2.2 * weights
    # Of the experts only the chosen ones count: 2 of 8 here.
    sparse = ModelConfig.variant("tiny_26b_a4b", vocab_size=512)
    dense_would_be = ModelConfig.variant("tiny_26b_a4b", vocab_size=512, top_k_experts=8)
    expert = 6 * 3 * sparse.hidden_size * sparse.moe_intermediate_size * sparse.num_hidden_layers
    assert flops_per_token(dense_would_be, 32) - flops_per_token(sparse, 32) == pytest.approx(6 * expert)


def test_model_flops_of_what_is_frozen():
    """By a count of products of one token: forward and input gradients of every matrix, weight gradients of the trained."""
    cfg = ModelConfig.variant("tiny_26b_a4b", vocab_size=512)
    attach = functools.partial(lora.attach, config=LoraConfig(targets=("attention", "experts"), rank=4))
    names = {name: math.prod(v.shape) for name, v in variables(attach(abstract(cfg))).items() if is_trainable(v)}
    of_base = {name: size for name, size in names.items() if lora.MARK not in name}
    used = {name: size / 4 if ".experts." in name else size for name, size in names.items()}  # 2 of 8 are chosen
    matrices = sum(size for name, size in used.items() if name.endswith(".w"))

    assert flops_per_token(cfg, 32, of_base) == pytest.approx(flops_per_token(cfg, 32))
    frozen = flops_per_token(cfg, 32, {})
    assert flops_per_token(cfg, 32) - frozen == pytest.approx(2 * matrices)
    assert flops_per_token(cfg, 32, {"own.full.mlp.up.w": 1000, "vision.x.w": 10**9}) - frozen == pytest.approx(2000)
    of_adapters = sum(size for name, size in used.items() if lora.MARK in name)
    only = {name: size for name, size in names.items() if lora.MARK in name}
    assert flops_per_token(cfg, 32, only) - frozen == pytest.approx(6 * of_adapters)


def test_recorder_drops_what_a_resumed_run_repeats(tmp_path):
    first = Recorder(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # a killed process
    second = Recorder(tmp_path, 2)
    second.write(3, {"loss": 7.0})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_log_line():
    meter = Meter(1000, flops_per_token=1e6, peak_flops=1e12)
    row = {"loss": 2.0, "ce": 2.0, "kl": 0.0, "accuracy": 0.5, "tokens": 10.0, "slots": 20.0, "skipped": 0.0}
    meter.add({**row, "grad_norm": 1.0, "learning_rate": 1e-3})
    meter.add({**row, "loss": np.nan, "grad_norm": np.nan, "skipped": 1.0, "learning_rate": 1e-3})
    meter.add({**row, "loss": 1.0, "tokens": 30.0, "grad_norm": 3.0, "learning_rate": 2e-3})
    values, line = meter.read(10)
    assert values["loss"] == pytest.approx(1.25)
    assert values["grad_norm"] == 2.0
    assert meter.skipped_in_a_row == 0
    for part in ("step   10/1000", "loss 1.2500", "skipped 1", "lr 2.00e-03", "tokens/s", "MFU", "ETA"):
        assert part in line
    assert "kl" not in line


def test_units():
    assert [duration(s) for s in (7.4, 200, 7500)] == ["7s", "3m20s", "2h05m"]
    assert [si(v) for v in (12.0, 4560, 3.2e9)] == ["12", "4.56k", "3.2G"]

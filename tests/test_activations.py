"""int8 activations and cache: the formulas, what they cover, calibration, and that checkpoints and decoding carry them."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.kv import empty_cache
from gemma4_jax.model.parameters import arrays, with_arrays
from gemma4_jax.model.transformer import abstract
from gemma4_jax.quant.activations import DYNAMIC, STATIC, check_calibrated, scales, set_activations, uncalibrated
from gemma4_jax.quant.policy import QuantConfig, apply, described, quantisable, snap
from gemma4_jax.train.calibration import calibrate
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step

SMALL = dict(vocab_size=128, hidden_size=64, head_dim=32, global_head_dim=32, sliding_window=16)
SIZES = {
    "tiny_e2b": dict(num_hidden_layers=10, num_kv_shared_layers=5),
    "tiny_26b_a4b": dict(num_hidden_layers=6),
    "tiny_31b": dict(num_hidden_layers=6),
}
MOBILE = QuantConfig(policy="mobile")

forward = quick.jit(lambda model, tokens: model(tokens))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_of(name: str):
    shapes = abstract(ModelConfig.variant(name, **SMALL, **SIZES[name]))
    rng = np.random.default_rng(1)

    def fill(key, shape):
        if key.endswith(".w"):
            return jnp.asarray(rng.normal(size=shape.shape) * 0.1, shape.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.0, shape.shape), shape.dtype)

    return with_arrays(shapes, {key: fill(key, shape) for key, shape in arrays(shapes).items()})


def batches_of(count: int):
    for seed in range(count):
        tokens = np.random.default_rng(seed).integers(5, 128, (2, 12)).astype(np.int32)
        positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
        weights = np.ones((2, 12), np.float32)
        yield {
            "tokens": tokens,
            "positions": positions,
            "segment_ids": np.ones((2, 12), np.int32),
            "targets": np.roll(tokens, -1, 1),
            "loss_weights": weights,
        }


TOKENS = next(batches_of(1))["tokens"]


@pytest.fixture(scope="module")
def mobile():
    return calibrate(apply(model_of("tiny_e2b"), MOBILE), batches_of(1), 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_static_rounding_is_that_of_the_mobile_format(dtype):
    """transformers' apply_srq, computed in float32; the gradient of x is identity, that of the scale is absmax / 127."""
    x = jnp.asarray(normal(8, 32), dtype)
    scale = jnp.float32(0.013)
    rounded, pull_back = jax.vjp(jax.jit(lambda x, s: STATIC.enter(x, s)), x, scale)
    exact = np.asarray(x, np.float32)
    want = np.clip(np.rint(exact / np.float32(scale)), -128, 127) * np.float32(scale)
    assert (want == np.float32(-128) * np.float32(scale)).any()
    np.testing.assert_array_equal(rounded, jnp.asarray(want, dtype))
    d_x, d_scale = pull_back(jnp.asarray(normal(8, 32, seed=1), dtype))
    np.testing.assert_array_equal(d_x, jnp.asarray(normal(8, 32, seed=1), dtype))
    assert float(d_scale) == pytest.approx(np.abs(exact).max() / 127)
    np.testing.assert_array_equal(STATIC.leave(x, jnp.float32(0)), x)


def test_dynamic_rounding_has_a_scale_per_token():
    x = normal(8, 32) * np.logspace(-3, 3, 8, dtype=np.float32)[:, None]
    x[2] = 0
    scale = np.abs(x).max(-1, keepdims=True) / 127
    want = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)) * scale
    rounded, pull_back = jax.vjp(lambda x: DYNAMIC.enter(x, None), jnp.asarray(x))
    np.testing.assert_allclose(rounded, want, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(pull_back(rounded)[0], rounded)
    np.testing.assert_array_equal(DYNAMIC.leave(x, None), x)


@pytest.mark.parametrize("name", SIZES)
def test_dynamic_activations_and_the_cache_move_logits_of_every_variant(name):
    model = apply(model_of(name), QuantConfig(policy="int8"))
    plain = forward(model, TOKENS)
    for activations, kv_cache in (("dynamic", "none"), ("none", "int8")):
        moved = float(jnp.abs(forward(set_activations(model, activations, kv_cache), TOKENS) - plain).mean())
        assert 1e-5 < moved < 0.5 * float(jnp.abs(plain).mean()), (activations, kv_cache)


def test_experts_round_their_inner_activations_too():
    experts = jax.tree.map(
        lambda x: x[0], apply(model_of("tiny_26b_a4b"), QuantConfig(policy="int8")).own.full.sparse.experts
    )
    x, weights = jnp.asarray(normal(1, 5, 64)), jnp.ones((1, 5, 1))
    index = jnp.arange(5, dtype=jnp.int32)[None, :, None]
    found = set_activations(experts, "dynamic", "none")(x, weights, index)
    gate_up, down = (np.asarray(weight.rounded()) for weight in (experts.gate_up, experts.down))
    entered = np.asarray(DYNAMIC.enter(x, None))[0]
    inner = np.stack([np.einsum("D,DCF->CF", entered[i], gate_up[i]) for i in range(5)])
    inner = np.asarray(DYNAMIC.enter(jax.nn.gelu(inner[:, 0], approximate=True) * inner[:, 1], None))
    want = np.stack([inner[i] @ down[i] for i in range(5)])
    np.testing.assert_allclose(found[0], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_static_activations_of_experts_are_refused():
    with pytest.raises(UserError, match="static has one scale per tensor, which experts do not have"):
        apply(model_of("tiny_26b_a4b"), QuantConfig(policy="int8", activations="static"))


def test_what_is_covered():
    """Every linear map with a grid; of the cache only layers that make keys and values, which others then share."""
    model = apply(model_of("tiny_e2b"), MOBILE)
    names = set(scales(model))
    linear = {path for path, module in quantisable(model) if hasattr(module, "n_in")}
    assert {name for name in names if name.endswith("input_scale")} == {f"{path}.input_scale" for path in linear}
    assert {name for name in names if "cache" in name} == {
        f"own.{kind}.attention.{which}_cache_scale" for kind in ("sliding", "full") for which in "kv"
    }
    assert model.shared.full.attention.kv_rounding is None
    assert scales(model)["own.sliding.mlp.up.input_scale"].shape == (1, 4)
    assert scales(model)["own.full.mlp.up.input_scale"].shape == (1,)
    assert len(uncalibrated(model)) == len(names)
    with pytest.raises(UserError, match=f"{len(names)} activation scales are 0.*calibration never ran"):
        check_calibrated(model)
    check_calibrated(apply(model, QuantConfig(policy="q4_0")))
    assert not scales(snap(model))


def test_calibration_finds_the_largest_magnitudes():
    """Of the first layer, computed step by step; of two batches the moving average."""
    model = apply(model_of("tiny_e2b"), MOBILE)
    first = jax.tree.map(lambda x: x[0, 0], model.own.sliding)
    seen = []
    for batch in batches_of(2):
        h = model.embed.lookup(batch["tokens"], "float32")
        x = first.pre_attention_norm(h)
        k, v = first.attention.keys_values(x, model.places(jnp.asarray(batch["positions"])))
        seen.append([float(jnp.abs(value).max()) / 127 for value in (h, x, first.attention.q(x), k, v)])
    for count, want in ((1, seen[0]), (2, 0.9 * np.array(seen[0]) + 0.1 * np.array(seen[1]))):
        found = scales(calibrate(model, batches_of(2), count))
        layer = "own.sliding.attention"
        names = (
            f"{layer}.q.input_scale",
            f"{layer}.q.output_scale",
            f"{layer}.k_cache_scale",
            f"{layer}.v_cache_scale",
        )
        ours = [found["per_layer.projection.input_scale"], *(found[name][0, 0] for name in names)]
        np.testing.assert_allclose(ours, want, rtol=1e-4)
        check_calibrated(calibrate(model, batches_of(2), count))


def test_calibration_of_a_model_without_static_activations_reads_nothing():
    model = apply(model_of("tiny_31b"), QuantConfig(policy="int8", activations="dynamic"))
    assert calibrate(model, iter(()), 4) is model


def test_calibrated_scales_move_logits(mobile):
    weights_only = set_activations(mobile, "none", "none")
    assert float(jnp.abs(forward(mobile, TOKENS) - forward(weights_only, TOKENS)).mean()) > 1e-3


def test_a_checkpoint_keeps_everything(mobile, tmp_path):
    save_model(mobile, tmp_path / "model")
    loaded = load(tmp_path / "model", dtype="bfloat16", compute_dtype="float32")
    assert described(loaded) == described(mobile)
    for name, value in scales(mobile).items():
        np.testing.assert_array_equal(value, scales(loaded)[name])
    assert loaded.own.full.mlp.up.w.dtype == jnp.bfloat16
    same = load(tmp_path / "model")
    np.testing.assert_array_equal(forward(same, TOKENS), forward(mobile, TOKENS))


def test_decoding_rounds_as_the_whole_sequence_does(mobile):
    decoder = unroll(mobile)
    cache = empty_cache(mobile.cfg, 2, 16, "float32", 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    hidden, _ = jax.jit(lambda d, t, p, c: d.step(t, p, c))(decoder, TOKENS, positions, cache)
    want = jax.jit(lambda m, t: m.hidden(t))(mobile, TOKENS)
    # Sums in another order may move a value over the middle between two codes.
    assert float(jnp.abs(hidden - want).mean()) < 0.02 * float(jnp.abs(want).mean())


def test_training_leaves_calibrated_scales_and_moves_learned_ones(mobile):
    model = apply(mobile, dataclasses.replace(MOBILE, learn_scales=True, gradient="clipped"))
    model = calibrate(model, batches_of(1), 1)
    optim = optimizer(OptimConfig(learning_rate=1e-3), 10)
    step = make_train_step(model, optim)
    state, metrics = step(TrainState.create(model, optim, ()), next(batches_of(1)), None)
    assert np.isfinite(float(metrics["loss"]))
    before, after = arrays(model), arrays(state.model(model))
    learned = [name for name in before if name.endswith("grid_scale")]
    assert len(learned) == len([1 for _, module in quantisable(model) if hasattr(module, "n_in")])
    for name in learned:
        assert bool((before[name] != after[name]).any()), name
        assert before[name].dtype == jnp.float32
    for name, value in scales(model).items():
        np.testing.assert_array_equal(value, after[name])

"""The model against itself: cached = uncached across the ring's wrap, packed = separate, remat = no remat, and its sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.kv import empty_cache
from gemma4_jax.model.parameters import arrays, is_trainable, map_arrays, modules, variables
from gemma4_jax.model.transformer import Transformer, abstract, init

VARIANTS = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")
WINDOW = 16


@functools.cache
def model_of(variant: str) -> Transformer:
    """A small model with every scale, norm and scalar random: ones would hide a factor that is left out."""
    small = dict(sliding_window=WINDOW, vocab_size=128, hidden_size=64, head_dim=16, global_head_dim=32)
    model = init(ModelConfig.variant(variant, **small), seed=1)
    keys = iter(jax.random.split(jax.random.key(2), len(variables(model))))

    def scramble(name, variable):
        value, key = variable.get_value(), next(keys)
        if name.endswith(".w"):
            return value
        return value * jax.random.uniform(key, value.shape, minval=0.5, maxval=1.5)

    return map_arrays(scramble, model)


def tokens_of(model: Transformer, rows: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 3, model.cfg.vocab_size, dtype=jnp.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_equal_one_forward_pass_across_the_ring(variant: str):
    model = model_of(variant)
    length, max_length = 3 * WINDOW + 7, 64
    tokens = tokens_of(model, 3, length)
    whole = np.asarray(jax.jit(lambda m: m(tokens))(model))
    # Prompts shorter than, equal to and longer than the window, padded on the left, the right and not at all.
    starts = np.array([5, WINDOW, WINDOW + 9])
    width = int(starts.max())
    prompt, positions = np.zeros((3, width), np.int32), np.full((3, width), -1, np.int32)
    for row, start in enumerate(starts):
        at = slice(width - start, width) if row == 0 else slice(0, start)
        prompt[row, at], positions[row, at] = tokens[row, :start], np.arange(start)
    hidden, cache = jax.jit(lambda m: m.prefill(jnp.asarray(prompt), jnp.asarray(positions), max_length))(model)
    logits = np.asarray(model.logits(hidden))
    for row, start in enumerate(starts):
        real = logits[row, positions[row] >= 0]
        np.testing.assert_allclose(real, whole[row, :start], atol=2e-4, rtol=0)

    decoder = unroll(model)
    step = jax.jit(lambda d, t, p, c: d.step(t, p, c), donate_argnums=3)
    at = starts.copy()
    while (at < length).any():
        alive = at < length
        token = np.where(alive, np.asarray(tokens)[np.arange(3), np.minimum(at, length - 1)], 0)
        position = np.where(alive, at, -1)
        hidden, cache = step(
            decoder, jnp.asarray(token[:, None], jnp.int32), jnp.asarray(position[:, None], jnp.int32), cache
        )
        logits = np.asarray(decoder.logits(hidden))[:, 0]
        for row in np.flatnonzero(alive):
            np.testing.assert_allclose(logits[row], whole[row, at[row]], atol=2e-4, rtol=0)
        at = at + alive


def test_several_tokens_a_step_need_a_ring_with_room():
    model = model_of("tiny_e2b")
    tokens = tokens_of(model, 1, 40)
    whole = jax.jit(lambda m: m(tokens))(model)
    prefill = jax.jit(lambda m: m.prefill(tokens[:, :30], jnp.arange(30, dtype=jnp.int32)[None], 64, ahead=5))
    _, cache = prefill(model)
    assert cache.positions["sliding"].shape == (1, WINDOW + 4)
    decoder = unroll(model)
    step = jax.jit(lambda d, t, p, c: d.step(t, p, c))
    for start in (30, 35):
        at = jnp.arange(start, start + 5, dtype=jnp.int32)[None]
        hidden, cache = step(decoder, tokens[:, start : start + 5], at, cache)
        np.testing.assert_allclose(decoder.logits(hidden), whole[:, start : start + 5], atol=2e-4, rtol=0)


def test_shared_layers_have_no_cache_and_sliding_ones_a_ring():
    cfg = ModelConfig.variant("e2b")
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, 131072, "bfloat16"))
    assert len(cache.layers) == 15
    assert [parts["k"].values.shape[2] for parts in cache.layers[:5]] == [512] * 4 + [131072]


@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_31b"])
def test_packed_rows_equal_separate_rows_gradients_included(variant: str):
    """Two texts in one row, and each in a row of its own; tests/golden compares all structures with transformers."""
    model = model_of(variant)
    first, second = tokens_of(model, 1, 21, seed=1), tokens_of(model, 1, 40, seed=2)
    count = jnp.arange(40, dtype=jnp.int32)[None]
    together = (
        jnp.concatenate([first, second], axis=1),
        jnp.concatenate([count[:, :21], count], axis=1),
        jnp.concatenate([jnp.full((1, 21), 1, jnp.int32), jnp.full((1, 40), 2, jnp.int32)], axis=1),
    )
    apart = (
        jnp.concatenate([jnp.pad(first, ((0, 0), (0, 19))), second]),
        jnp.concatenate([jnp.where(count < 21, count, -1), count]),
        jnp.concatenate([(count < 21).astype(jnp.int32), jnp.ones_like(count)]),
    )

    def run(m, tokens, positions, segments):
        out = m(tokens, positions, segments)
        real = jnp.where((positions >= 0)[:, :, None], out, 0.0)
        return jnp.sum(jnp.sin(real)), out

    gradient = quick.jit(jax.value_and_grad(run, has_aux=True))
    (_, a), grad_a = gradient(model, *together)
    (_, b), grad_b = gradient(model, *apart)
    np.testing.assert_allclose(a[0], np.concatenate([b[0, :21], b[1]]), atol=2e-4, rtol=0)
    assert_close_gradients(grad_a, grad_b, 1e-4)


@functools.cache
def gradient_with(variant: str, remat: str) -> Transformer:
    model = model_of(variant)
    tokens = tokens_of(model, 2, 40)
    return quick.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(tokens, remat=remat)))))(model)


@pytest.mark.parametrize(
    ("variant", "remat"),
    [("tiny_e2b", "full"), ("tiny_31b", "save_projections"), ("tiny_31b", "save_attention"), ("tiny_31b", "offload")],
)
def test_remat_changes_no_gradient(variant: str, remat: str):
    assert_close_gradients(gradient_with(variant, remat), gradient_with(variant, "none"), 1e-5)


def assert_close_gradients(ours: Transformer, theirs: Transformer, tolerance: float):
    """Relative error of each parameter's gradient; rounding in another order is the only difference allowed.

    Buffers have none that means anything: the last layer's scalar vanishes in the final norm.
    """
    other = arrays(theirs)
    for name, variable in variables(ours).items():
        if not is_trainable(variable):
            continue
        value = variable.get_value()
        scale = np.linalg.norm(other[name])
        assert scale > 0, f"{name} gets no gradient"
        assert np.linalg.norm(value - other[name]) <= tolerance * scale, name


def test_producer_gets_the_gradient_of_every_consumer():
    """Blocking the shared layers' output projections must change the producer's key gradient."""
    model = model_of("tiny_e2b")
    tokens = tokens_of(model, 1, 40)

    whole = quick.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(tokens)))))

    def gradient(m):
        return arrays(whole(m))["own.sliding.attention.k.w"][-1, -1]

    silent = map_arrays(
        lambda name, v: v.get_value() * (0.0 if name.startswith("shared.sliding.attention.o") else 1.0), model
    )
    assert np.abs(gradient(model) - gradient(silent)).max() > 1e-3


def test_padding_is_never_seen_and_gives_no_nan():
    model = model_of("tiny_31b")
    tokens = tokens_of(model, 2, 30)
    positions = jnp.stack([jnp.full(30, -1), jnp.where(jnp.arange(30) < 20, jnp.arange(30), -1)]).astype(jnp.int32)
    run = jax.jit(lambda m, t: m(t, positions))
    out, changed = run(model, tokens), run(model, tokens.at[1, 20:].set(7))
    assert bool(jnp.isfinite(out).all())
    np.testing.assert_array_equal(out[1, :20], changed[1, :20])


def test_bfloat16_computes_near_float32():
    model = model_of("tiny_e4b")
    tokens = tokens_of(model, 2, 40)
    half = map_arrays(lambda _, v: v.get_value(), model)
    half.compute_dtype = "bfloat16"
    run = jax.jit(lambda m: m(tokens))
    exact, rounded = run(model), run(half)
    assert rounded.dtype == jnp.float32
    # Random networks amplify rounding: judged by the mean and by the first choice, not by a maximum.
    assert float(jnp.mean(jnp.abs(exact - rounded))) < 0.3 * float(jnp.std(exact))
    assert float(jnp.mean(jnp.argmax(exact, -1) == jnp.argmax(rounded, -1))) > 0.7
    assert bool((arrays(half)["embed.w"] == arrays(model)["embed.w"]).all())


@pytest.mark.parametrize(("variant", "billions"), [("e2b", 4.63), ("e4b", 7.46), ("26b_a4b", 25.23), ("31b", 30.70)])
def test_number_of_text_parameters(variant: str, billions: float):
    leaves = jax.tree.leaves(abstract(ModelConfig.variant(variant)))
    assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.006)


def test_every_variable_names_its_dims():
    for variant in VARIANTS:
        for name, variable in variables(abstract(ModelConfig.variant(variant))).items():
            assert len(variable.dims) == variable.get_value().ndim, name


def test_scalars_are_buffers_and_modules_have_paths():
    model = abstract(ModelConfig.variant("tiny_26b_a4b"))
    untrained = {name for name, variable in variables(model).items() if not is_trainable(variable)}
    assert untrained == {"own.sliding.layer_scalar", "own.full.layer_scalar"}
    assert "own.sliding.sparse.experts.gate_up" in dict(modules(model))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 16}, "whole blocks"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2, "num_global_key_value_heads": 2}, "multiple"),
        ({"num_kv_shared_layers": 15}, "leaves none"),
        ({"use_bidirectional_attention": "all"}, "not supported"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
    ],
)
def test_impossible_models_are_refused(change: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        ModelConfig.variant("tiny_e2b", **change)


def test_unknown_variant_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'e4b'"):
        ModelConfig.variant("e4")

"""Number grids: q4_0 and q8_0 against gguf's bytes, the others against plain NumPy twins, and what all of them promise."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import (
    GRIDS,
    INT2_CHANNEL,
    INT4_B256,
    INT4_CHANNEL,
    INT4_SYM7_G32,
    INT8_CHANNEL,
    Q4_0,
    Q4_0_BF16,
    Q8_0,
    grid_named,
    int4_blocks,
)

EVERY = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
CHANNELS = (INT8_CHANNEL, INT4_CHANNEL, INT2_CHANNEL, INT4_B256)


def normal(*shape, scale=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def ggml_bytes(codes, scale):
    """Codes [rows, n] and scales [rows, n / 32] as Q4_0 blocks: float16 d, then element j low and j + 16 high in byte j."""
    nibbles = (np.asarray(codes).reshape(-1, 2, 16) + 8).astype(np.uint8)
    d = np.asarray(scale, np.float16).reshape(-1, 1).view(np.uint8)
    return np.concatenate([d, nibbles[:, 0] | nibbles[:, 1] << 4], axis=1).reshape(np.shape(codes)[0], -1)


def magnitudes():
    """Blocks of normal weights from 1e-9 (float16 scales underflow) over subnormal scales to 1e4."""
    return normal(140, 64) * np.repeat(np.logspace(-9, 4, 14), 10).astype(np.float32)[:, None]


def half_codes():
    """Weights exactly between two codes, and extrema of equal magnitude and either sign first."""
    rows = []
    for extremum in (8.0, -8.0, 1.0, -1.0, 0.3, -0.7):
        steps = np.arange(-8, 8) + 0.5
        first = np.concatenate([[-8.0], steps, np.zeros(15)]) * extremum / -8
        tie = np.concatenate([np.zeros(3), [extremum, -extremum], np.linspace(-1, 1, 27) * extremum])
        rows.append(np.concatenate([first, tie]))
    return np.array(rows, np.float32)


def near_ties():
    """Weights a few units in the last place away from the middle between two codes."""
    rng = np.random.default_rng(1)
    x = np.empty((20_000, 32), np.float32)
    x[:, 0] = rng.normal(size=len(x))
    middle = rng.integers(-8, 7, size=(len(x), 31)) + 0.5
    x[:, 1:] = (middle * (x[:, :1] / -8)).astype(np.float32)
    x[:, 1:] = (x[:, 1:].view(np.int32) + rng.integers(-3, 4, size=middle.shape, dtype=np.int32)).view(np.float32)
    return x


DATA = {
    "normal": normal(64, 256, scale=0.02),
    "magnitudes": magnitudes(),
    "constant": np.repeat(np.array([[1.0], [-1.0], [0.1], [-3e-3], [1e-7]], np.float32), 64, axis=1),
    "zeros": np.zeros((2, 64), np.float32),
    "half codes": half_codes(),
    "near ties": near_ties(),
    "bfloat16": normal(64, 256).astype(ml_dtypes.bfloat16).astype(np.float32),
}


@pytest.mark.parametrize("name", DATA)
def test_q4_0_is_gguf_to_the_byte(name):
    x = DATA[name]
    want = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0)
    codes, scale = Q4_0.encode(jnp.asarray(x), -1)
    np.testing.assert_array_equal(ggml_bytes(codes, scale), want)
    values = gguf.quants.dequantize(want, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(bits(Q4_0.decode(codes, scale, -1)), bits(values))
    np.testing.assert_array_equal(bits(Q4_0.round(jnp.asarray(x), -1)), bits(values))


def test_near_ties_would_show_a_fused_multiply_add():
    """The data above has weights whose code depends on rounding the product before the sum, so the test above can fail."""
    x = DATA["near ties"]
    inverse = 1 / (x[:, :1] / np.float32(-8))
    fused = (x.astype(np.float64) * inverse + 8.5).astype(np.float32)
    assert (np.trunc(fused) != np.trunc(x * inverse + np.float32(8.5))).any()


def sym7(x):
    """int4_sym7_g32 in NumPy: codes, scales, values."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    mantissa, exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True) * np.float32(1 / 7))
    scale = np.ldexp(np.floor(mantissa * 32) / 32, exponent).astype(np.float32)
    scale = np.maximum(scale, np.float32(2.0**-20))
    codes = np.clip(np.rint(blocks * (1 / scale)), -7, 7).astype(np.int8)
    return codes.reshape(x.shape), scale[..., 0], (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("name", DATA)
def test_int4_sym7_equals_its_numpy_twin(name):
    x = DATA[name]
    codes, scale, values = sym7(x)
    ours = INT4_SYM7_G32.encode(jnp.asarray(x), -1)
    np.testing.assert_array_equal(ours[0], codes)
    np.testing.assert_array_equal(bits(ours[1]), bits(scale))
    np.testing.assert_array_equal(bits(INT4_SYM7_G32.decode(*ours, -1)), bits(values))
    np.testing.assert_array_equal(bits(INT4_SYM7_G32.round(jnp.asarray(x), -1)), bits(values))


@pytest.mark.parametrize("name", DATA)
def test_int4_sym7_survives_float16_and_bfloat16(name):
    """Scales and values are exact in bfloat16 and scales in float16; quantising the stored values gives the same again."""
    codes, scale = INT4_SYM7_G32.encode(jnp.asarray(DATA[name]), -1)
    values = INT4_SYM7_G32.decode(codes, scale, -1)
    assert scale.dtype == jnp.float16
    for exact in (np.asarray(scale, np.float32), np.asarray(values)):
        np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16).astype(np.float32), exact)
    again = INT4_SYM7_G32.encode(jnp.asarray(np.asarray(values).astype(ml_dtypes.bfloat16)), -1)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))


def five_bits(magnitude):
    mantissa, exponent = np.frexp(magnitude)
    return np.maximum(np.ldexp(np.floor(mantissa * 32) / 32, exponent), 2.0**-20).astype(np.float32)


def portable_q4_0(x):
    """q4_0_bf16 in NumPy: codes, scales, values."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    extremum = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = np.where(extremum == 0, 0.0, -np.sign(extremum) * five_bits(np.abs(extremum) / 8)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.rint(blocks * inverse), -8, 7).astype(np.int8)
    return codes.reshape(x.shape), scale[..., 0], (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("name", DATA)
def test_portable_q4_0_equals_its_numpy_twin_and_survives_bfloat16_and_llama_cpp(name):
    """Stored in bfloat16 and quantised by ggml's rule (gguf-py), it gives its own codes and scales: any converter is right."""
    x = DATA[name]
    codes, scale, values = portable_q4_0(x)
    ours = Q4_0_BF16.encode(jnp.asarray(x), -1)
    np.testing.assert_array_equal(ours[0], codes)
    np.testing.assert_array_equal(bits(ours[1]), bits(scale))
    np.testing.assert_array_equal(bits(Q4_0_BF16.round(jnp.asarray(x), -1)), bits(values))
    stored = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(stored, values)
    again = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    sound = np.abs(scale.reshape(-1)) > 2.0**-20
    assert sound.any() == (name != "zeros")
    np.testing.assert_array_equal(again[sound], ggml_bytes(codes, scale).reshape(-1, 18)[sound])


@pytest.mark.parametrize("name", DATA)
def test_q8_0_is_gguf_to_the_byte(name):
    x = DATA[name]
    want = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    codes, scale = Q8_0.encode(jnp.asarray(x), -1)
    d = np.asarray(scale, np.float16).reshape(-1, 1).view(np.uint8)
    ours = np.concatenate([d, np.asarray(codes).reshape(-1, 32).view(np.uint8)], axis=1)
    np.testing.assert_array_equal(ours.reshape(want.shape), want)
    values = gguf.quants.dequantize(want, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(bits(Q8_0.round(jnp.asarray(x), -1)), bits(values))


def channels(grid, x):
    """The grids with float32 scales in NumPy: codes, scales, values."""
    blocks = x.reshape(*x.shape[:-1], -1, grid.block or x.shape[-1])
    largest = np.abs(blocks).max(-1, keepdims=True)
    unit = largest * np.float32(1 / 127)
    if grid is INT8_CHANNEL:
        scale = unit
    else:
        parts = np.rint(np.divide(np.abs(blocks), unit, out=np.zeros_like(blocks), where=unit > 0))
        step = {INT2_CHANNEL: 1.05}.get(grid, 0.34)
        scale = unit * np.sqrt((parts**2).mean(-1, keepdims=True, dtype=np.float64)) * step
    mantissa, exponent = np.frexp(scale)
    scale = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    lowest, highest = {INT8_CHANNEL: (-127, 127), INT2_CHANNEL: (-2, 1)}.get(grid, (-8, 7))
    codes = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = np.clip(np.rint(codes), lowest, highest).astype(np.int8)
    return codes.reshape(x.shape), scale[..., 0], (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("grid", CHANNELS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("name", ["normal", "magnitudes", "constant", "zeros", "bfloat16"])
def test_channel_grids_equal_their_numpy_twin(grid, name):
    """But for weights within rounding of the middle between two codes, one in 1,000 at most."""
    x = np.tile(DATA[name], (1, 256 // DATA[name].shape[1]))
    codes, scale, values = channels(grid, x)
    ours = grid.encode(jnp.asarray(x), -1)
    np.testing.assert_array_equal(bits(ours[1]), bits(scale))
    assert ours[1].dtype == jnp.float32
    assert np.mean(np.asarray(ours[0]) != codes) <= 1e-3
    np.testing.assert_allclose(grid.decode(*ours, -1), values, atol=1.01 * scale.max())
    np.testing.assert_array_equal(bits(grid.round(jnp.asarray(x), -1)), bits(grid.decode(*ours, -1)))
    np.testing.assert_array_equal(np.asarray(ours[1], ml_dtypes.bfloat16).astype(np.float32), ours[1])


def test_scales_of_channels_do_not_depend_on_the_order_of_the_sum():
    x = normal(4, 1000)
    shuffled = x[:, np.random.default_rng(3).permutation(1000)]
    for grid in (INT4_CHANNEL, INT2_CHANNEL):
        scales = [grid.encode(jnp.asarray(y), -1)[1] for y in (x, shuffled)]
        np.testing.assert_array_equal(bits(scales[0]), bits(scales[1]))


def test_int8_channel_quantises_its_own_values_to_themselves():
    codes, scale = INT8_CHANNEL.encode(jnp.asarray(DATA["normal"]), -1)
    again = INT8_CHANNEL.encode(INT8_CHANNEL.decode(codes, scale, -1), -1)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))


def test_q4_0_quantises_its_own_values_to_themselves():
    """In float32, wherever the float16 scale is not 0."""
    codes, scale = Q4_0.encode(jnp.asarray(DATA["normal"]), -1)
    again = Q4_0.encode(Q4_0.decode(codes, scale, -1), -1)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))


ERRORS = {
    "q4_0": 0.0860,
    "q4_0_bf16": 0.0856,
    "int4_sym7_g32": 0.0954,
    "q8_0": 0.0054,
    "int8_channel": 0.0081,
    "int4_channel": 0.1089,
    "int2_channel": 0.3866,
    "int4_b256": 0.1084,
}


@EVERY
def test_error_on_normal_weights(grid):
    """Relative RMS error; 2e-4 is three standard deviations of the estimate from a million weights (int2: 1e-3)."""
    x = normal(1024, 1024 if grid.block else 1536)
    rounded = np.asarray(grid.round(jnp.asarray(x), -1))
    error = np.sqrt(np.mean((rounded - x) ** 2) / np.mean(x**2))
    assert error == pytest.approx(ERRORS[grid.name], abs=1e-3 if grid.code_bits == 2 else 2e-4)


def test_the_steps_of_channel_grids_are_the_best():
    """Every other step, longer or shorter, has a larger error on normal weights."""
    x = jnp.asarray(normal(512, 2048))
    for grid in (INT4_CHANNEL, INT2_CHANNEL):
        others = [dataclasses.replace(grid, step=grid.step * factor) for factor in (0.9, 1.0, 1.1)]
        low, best, high = (float(jnp.square(other.round(x, -1) - x).mean()) for other in others)
        assert best < min(low, high)


@EVERY
def test_storage(grid):
    codes, scale = grid.encode(jnp.asarray(normal(256, 512)), 0)
    assert grid.bits((256, 512), 0) == codes.size * grid.code_bits + scale.size * scale.dtype.itemsize * 8
    assert int(codes.min()) >= grid.lowest
    assert int(codes.max()) <= grid.highest
    assert grid.highest - grid.lowest < 2**grid.code_bits
    want = {"q8_0": 8.5, "int8_channel": 8, "int4_channel": 4, "int2_channel": 2, "int4_b256": 4.125}
    assert grid.bits_per_weight == want.get(grid.name, 4.5)


@EVERY
def test_blocks_run_along_the_axis(grid):
    x = jnp.asarray(normal(2, 512, 3))
    codes, scale = grid.encode(x, 1)
    assert codes.shape == x.shape
    assert codes.dtype == jnp.int8
    assert scale.shape == (2, 512 // (grid.block or 512), 3)
    turned = grid.encode(jnp.moveaxis(x, 1, -1), -1)
    np.testing.assert_array_equal(codes, jnp.moveaxis(turned[0], -1, 1))
    np.testing.assert_array_equal(scale, jnp.moveaxis(turned[1], -1, 1))
    np.testing.assert_array_equal(grid.decode(codes, scale, 1), grid.decode(codes, scale, -2))


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_stays_visible(grid, bad):
    """A block with NaN, infinity or weights beyond its scale has no finite weight left; its neighbours are untouched."""
    x = normal(4, 512)
    clean = np.asarray(grid.round(jnp.asarray(x), -1))
    x[1, 500] = bad
    codes, scale = grid.encode(jnp.asarray(x), -1)
    rounded = np.array(grid.decode(codes, scale, -1))
    np.testing.assert_array_equal(rounded, np.asarray(grid.fake_quant(jnp.asarray(x), -1)))
    own = slice(-grid.block if grid.block else None, None)
    if bad == 3e38 and grid.scale_bits == 32:  # a float32 scale holds it
        assert np.isfinite(rounded).all()
    else:
        assert not np.isfinite(rounded[1, own]).any()
    rounded[1, own] = clean[1, own]
    np.testing.assert_array_equal(rounded, clean)


@EVERY
def test_zeros_and_subnormals_are_zero(grid):
    for value in (0.0, 1e-40, -1e-40):
        assert not np.asarray(grid.round(jnp.full((1, 256), value, jnp.float32), -1)).any()


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_quant_is_decode_of_encode_with_the_gradient_of_identity(grid, dtype):
    x = jnp.asarray(normal(8, 256), dtype)
    weight = jnp.asarray(normal(8, 256, seed=1), dtype)
    want = grid.decode(*grid.encode(x, -1), -1).astype(dtype)
    rounded, pull_back = jax.vjp(jax.jit(lambda x: grid.fake_quant(x, -1)), x)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, want)
    np.testing.assert_array_equal(pull_back(weight)[0], weight)
    tangent = jax.jvp(lambda x: grid.fake_quant(x, -1), (x,), (weight,))[1]
    np.testing.assert_array_equal(tangent, weight)


@EVERY
def test_rounding_a_slice_in_a_scan_is_slicing_the_rounded_stack(grid):
    x = jnp.asarray(normal(3, 256, 16))
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, w: (c, grid.fake_quant(w, -2)), None, x)[1])(x)
    np.testing.assert_array_equal(bits(scanned), bits(grid.round(x, -2)))


@EVERY
def test_memory_is_that_of_the_result(grid):
    """Temporaries stay below a quarter of the weight: maxima and scales, no second copy of anything."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for axis in (0, 1):
        memory = jax.jit(lambda x, axis=axis: grid.fake_quant(x, axis)).lower(x).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes <= x.size * 4 / 4


def test_jit_tells_grids_apart():
    traced = []

    @functools.partial(jax.jit, static_argnums=1)
    def rounded(x, grid):
        traced.append(grid)
        return grid.round(x, -1)

    x = jnp.asarray(normal(1, 32))
    results = [rounded(x, grid) for grid in (Q4_0, INT4_SYM7_G32, Q4_0)]
    assert traced == [Q4_0, INT4_SYM7_G32]
    assert (results[0] != results[1]).any()
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("grid", [grid for grid in GRIDS.values() if grid.block], ids=lambda grid: grid.name)
def test_a_dim_that_does_not_divide_is_refused(grid):
    with pytest.raises(UserError, match=rf"multiple of {grid.block} .* got 48"):
        grid.encode(jnp.zeros((48, 2)), 0)


@EVERY
def test_given_scales_are_used_and_learn_by_lsq(grid):
    """Codes are w / scale to the nearest; the scale's gradient is the code's minus w / scale, the last code where clipped."""
    x = jnp.asarray(normal(4, 512))
    scale = grid.encode(x, -1)[1].astype(jnp.float32) * 0.7
    held = np.asarray(grid.storable(scale))
    wide = np.repeat(held, x.shape[-1] // held.shape[-1], axis=-1)
    place = np.asarray(x) / wide
    code = np.clip(np.rint(place), grid.lowest, grid.highest)
    rounded, pull_back = jax.vjp(jax.jit(lambda x, s: grid.fake_quant(x, -1, s)), x, scale)
    near_half = (np.abs(np.abs(place) % 1 - 0.5) < 1e-3) & (place > grid.lowest - 1) & (place < grid.highest + 1)
    np.testing.assert_allclose(np.where(near_half, 0, rounded), np.where(near_half, 0, code * wide), rtol=1e-6)
    np.testing.assert_array_equal(rounded, grid.decode(*grid.encode(x, -1, scale), -1))
    weight = jnp.asarray(normal(4, 512, seed=1))
    d_x, d_scale = pull_back(weight)
    np.testing.assert_array_equal(d_x, weight)
    inside = (place > grid.lowest - 0.5) & (place < grid.highest + 0.5)
    assert inside.any()
    assert not inside.all()
    slope = np.where(near_half, 0, np.where(inside, code - place, code)) * np.asarray(weight)
    want = slope.reshape(*scale.shape, -1).sum(-1)
    size = (grid.block or 512) * grid.highest
    np.testing.assert_allclose(d_scale * size**0.5, want, atol=3 + 1e-3 * np.abs(want).max())


@EVERY
def test_clipped_gradients_are_0_beyond_the_codes(grid):
    grid = dataclasses.replace(grid, clipped=True)
    x, weight = jnp.asarray(normal(4, 512)), jnp.asarray(normal(4, 512, seed=1))
    scale = grid.encode(x, -1)[1].astype(jnp.float32) * 0.7
    place = np.asarray(x) / np.repeat(np.asarray(grid.storable(scale)), 512 // scale.shape[-1], axis=-1)
    inside = (place > grid.lowest - 0.5) & (place < grid.highest + 0.5)
    assert 0 < inside.sum() < inside.size
    for gradient, mask in (
        (jax.grad(lambda x: (grid.fake_quant(x, -1, scale) * weight).sum())(x), inside),
        (jax.grad(lambda x: (grid.fake_quant(x, -1) * weight).sum())(x), None),
    ):
        kept = np.asarray(gradient) != 0
        np.testing.assert_array_equal(np.asarray(gradient)[kept], np.asarray(weight)[kept])
        if mask is not None:
            np.testing.assert_array_equal(kept, mask)
        elif grid.scale_bits == 32 and grid.code_bits < 8:
            assert not kept.all()


def test_grids_by_name():
    assert grid_named("q4_0") is Q4_0
    assert grid_named("int4_b64") == int4_blocks(64) != INT4_B256 == grid_named("int4_b256")
    with pytest.raises(UserError, match="did you mean 'q4_0'"):
        grid_named("q4_O")

"""Number grids: q4_0 against gguf's bytes, int4_sym7_g32 against a plain NumPy twin, and what both promise."""

import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import GRIDS, INT4_SYM7_G32, Q4_0, grid_named

BOTH = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))


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


def test_q4_0_quantises_its_own_values_to_themselves():
    """In float32, wherever the float16 scale is not 0."""
    codes, scale = Q4_0.encode(jnp.asarray(DATA["normal"]), -1)
    again = Q4_0.encode(Q4_0.decode(codes, scale, -1), -1)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))


@pytest.mark.parametrize(("grid", "error"), [(Q4_0, 0.0860), (INT4_SYM7_G32, 0.0954)], ids=["q4_0", "sym7"])
def test_error_on_normal_weights(grid, error):
    """Relative RMS error; 2e-4 is three standard deviations of the estimate from a million weights."""
    x = normal(1024, 1024)
    rounded = np.asarray(grid.round(jnp.asarray(x), -1))
    assert np.sqrt(np.mean((rounded - x) ** 2) / np.mean(x**2)) == pytest.approx(error, abs=2e-4)
    assert grid.bits_per_weight == 4.5


@BOTH
def test_blocks_run_along_the_axis(grid):
    x = jnp.asarray(normal(2, 64, 3))
    codes, scale = grid.encode(x, 1)
    assert codes.shape == x.shape
    assert codes.dtype == jnp.int8
    assert scale.shape == (2, 2, 3)
    turned = grid.encode(jnp.moveaxis(x, 1, -1), -1)
    np.testing.assert_array_equal(codes, jnp.moveaxis(turned[0], -1, 1))
    np.testing.assert_array_equal(scale, jnp.moveaxis(turned[1], -1, 1))
    np.testing.assert_array_equal(grid.decode(codes, scale, 1), grid.decode(codes, scale, -2))


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_stays_visible(grid, bad):
    """A block with NaN, infinity or weights beyond its scale has no finite weight left but zeros; its neighbours are untouched."""
    x = normal(4, 64)
    clean = np.asarray(grid.round(jnp.asarray(x), -1))
    x[1, 40] = bad
    codes, scale = grid.encode(jnp.asarray(x), -1)
    rounded = np.array(grid.decode(codes, scale, -1))
    np.testing.assert_array_equal(rounded, np.asarray(grid.fake_quant(jnp.asarray(x), -1)))
    assert not np.isfinite(rounded[1, 32:]).any()
    rounded[1, 32:] = clean[1, 32:]
    np.testing.assert_array_equal(rounded, clean)


@BOTH
def test_zeros_and_subnormals_are_zero(grid):
    for value in (0.0, 1e-40, -1e-40):
        assert not np.asarray(grid.round(jnp.full((1, 32), value, jnp.float32), -1)).any()


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_quant_is_decode_of_encode_with_the_gradient_of_identity(grid, dtype):
    x = jnp.asarray(normal(8, 64), dtype)
    weight = jnp.asarray(normal(8, 64, seed=1), dtype)
    want = grid.decode(*grid.encode(x, -1), -1).astype(dtype)
    rounded, pull_back = jax.vjp(jax.jit(lambda x: grid.fake_quant(x, -1)), x)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, want)
    np.testing.assert_array_equal(pull_back(weight)[0], weight)
    tangent = jax.jvp(lambda x: grid.fake_quant(x, -1), (x,), (weight,))[1]
    np.testing.assert_array_equal(tangent, weight)


@BOTH
def test_rounding_a_slice_in_a_scan_is_slicing_the_rounded_stack(grid):
    x = jnp.asarray(normal(3, 64, 16))
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, w: (c, grid.fake_quant(w, -2)), None, x)[1])(x)
    np.testing.assert_array_equal(bits(scanned), bits(grid.round(x, -2)))


@BOTH
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


@BOTH
def test_a_dim_that_does_not_divide_is_refused(grid):
    with pytest.raises(UserError, match=r"multiple of 32 .* got 48"):
        grid.encode(jnp.zeros((48, 2)), 0)


def test_grids_by_name():
    assert grid_named("q4_0") is Q4_0
    with pytest.raises(UserError, match="did you mean 'q4_0'"):
        grid_named("q4_O")

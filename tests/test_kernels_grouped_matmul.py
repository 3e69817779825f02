"""grouped_matmul gives the numbers and gradients of the reference and does the work of the chosen experts only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels import grouped_gpu, grouped_tpu, reference, sum_rows
from gemma4_jax.kernels.grouped_matmul import grouped_gradients, grouped_matmul

# Distributions of equally many rows over equally many experts share one compiled program.
SIZES = {
    "20 rows": [
        [4, 4, 4, 4, 4],
        [0, 9, 0, 11, 0],
        [20, 0, 0, 0, 0],
        [0, 0, 0, 0, 20],
        [1, 0, 18, 1, 0],
    ],
    "decode": [[0] * 20 + [1, 0, 2, 0, 1] + [0] * 30 + [4], [8] + [0] * 55],
    "one row": [[0, 1], [1, 0]],
    "longer than a block": [[300, 1, 129, 128], [0, 0, 558, 0]],
    "no rows": [[0, 0]],
}
# float32 sums over at most 300 products of order 1 in two orders; one bf16 rounding (2^-8) of the output.
TOLERANCE = {jnp.float32: 3e-5, jnp.bfloat16: 1e-2}


def arrays(sizes, dtype, k=12, n=10):
    rng = np.random.default_rng(1)
    rows, experts = sum(sizes), len(sizes)
    shapes = [(rows, k), (experts, k, n), (rows, n)]
    lhs, rhs, d_out = (jnp.asarray(rng.standard_normal(s, np.float32).astype(dtype)) for s in shapes)
    return lhs, rhs, jnp.array(sizes, jnp.int32), d_out


def output_and_gradients(lhs, rhs, sizes, d_out):
    return grouped_matmul(lhs, rhs, sizes), *grouped_gradients(lhs, rhs, sizes, d_out)


def reference_and_gradients(lhs, rhs, sizes, d_out):
    out, pullback = jax.vjp(lambda a, b: reference.grouped_matmul(a, b, sizes), lhs, rhs)
    return out, *pullback(d_out)


def zero_past(count, lhs, rhs, sizes, d_out):
    """The same with zeros in rows from `count` on, whatever expert they belong to."""
    real = jnp.arange(lhs.shape[0])[:, None] < count
    return jnp.where(real, lhs, 0.0), rhs, sizes, jnp.where(real, d_out, 0.0)


def assert_close(got, wanted, dtype):
    for name, a, b in zip(("output", "d_lhs", "d_rhs"), got, wanted, strict=True):
        assert a.dtype == b.dtype == dtype, name
        assert a.shape == b.shape, name
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.float32) for name in SIZES), ("20 rows", jnp.bfloat16), ("decode", jnp.bfloat16)]
)
def test_matches_reference(name, dtype):
    """The sizes are data: one program serves every distribution."""

    traced = []

    @jax.jit
    def both(lhs, rhs, sizes, d_out):
        traced.append(sizes)
        return [f(lhs, rhs, sizes, d_out) for f in (output_and_gradients, reference_and_gradients)]

    for sizes in SIZES[name]:
        got, wanted = both(*arrays(sizes, dtype))
        assert_close(got, wanted, dtype)
    assert len(traced) == 1


def test_rows_past_the_sizes_are_zero_and_gradients_are_added():
    lhs, rhs, _, d_out = arrays([7, 0, 6], jnp.float32)
    sizes = jnp.array([4, 0, 5], jnp.int32)
    wanted = reference_and_gradients(*zero_past(9, lhs, rhs, jnp.array([4, 0, 9], jnp.int32), d_out))
    got = jax.jit(output_and_gradients)(lhs, rhs, sizes, d_out)
    assert_close(got, wanted, jnp.float32)
    for keep in (False, True):
        added = grouped_gradients(lhs, rhs, sizes, d_out, jnp.ones_like(rhs), jnp.array(keep))
        assert_close((got[0], *added), (wanted[0], wanted[1], wanted[2] + float(keep)), jnp.float32)


# Tiles of 128 rows: one on the border of experts, one all past the sizes, a group with none, and no rows at all.
TILED = [[100, 0, 57, 60], [0, 0, 0, 0], [0, 0, 0, 400]]


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_kernels_of_other_platforms_match_the_reference(name):
    """Run by the interpreter of Pallas."""
    kernels = {"tpu": grouped_tpu, "gpu": grouped_gpu}[name]
    rng = np.random.default_rng(2)
    lhs, rhs, d_out = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((400, 24), (4, 24, 140), (400, 140)))

    @jax.jit
    def both(lhs, rhs, sizes, d_out):
        out = kernels.matmul(lhs, rhs, sizes, interpret=True)
        d_lhs = kernels.matmul(d_out, rhs, sizes, transposed=True, interpret=True)
        if name == "tpu":
            d_rhs = grouped_tpu.outer(lhs, d_out, sizes, jnp.full_like(rhs, jnp.nan), jnp.array(False), interpret=True)
        else:
            d_rhs = grouped_gpu.outer(lhs, d_out, sizes, interpret=True)
        return (out, d_lhs, d_rhs), plain(lhs, rhs, sizes, d_out)

    def plain(lhs, rhs, sizes, d_out):
        sizes_to_400 = sizes.at[-1].add(400 - sizes.sum())
        return reference_and_gradients(*zero_past(sizes.sum(), lhs, rhs, sizes_to_400, d_out))

    for sizes in TILED:
        got, wanted = both(lhs, rhs, jnp.array(sizes, jnp.int32), d_out)
        assert_close(got, wanted, jnp.float32)


def test_sum_rows():
    """Some rows have no place, some places no row; 200 places are more than one of the TPU's tiles."""
    rng = np.random.default_rng(3)
    rows, add_to = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((300, 24), (200, 24)))
    place = np.minimum(rng.integers(0, 230, 300), 200).astype(np.int32)
    place[place < 20] = 7
    place, weight = jnp.asarray(place), jnp.asarray(rng.standard_normal(300, np.float32))
    once = np.zeros((201, 24), np.float32)
    np.add.at(once, np.asarray(place), np.asarray(weight)[:, None] * np.asarray(rows))
    tiles = jax.jit(lambda keep: sum_rows._by_tiles(rows, place, weight, add_to, keep, interpret=True))
    for keep in (False, True):
        wanted = once[:200] + keep * np.asarray(add_to)
        got = sum_rows.sum_rows(rows, place, weight, add_to, jnp.array(keep))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        np.testing.assert_allclose(tiles(jnp.array(keep)), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_array_holds_every_expert(dtype):
    """Temporary memory: forward less than half the matrices, backward less than one float32 copy of them."""
    rows, experts, k, n = 256, 64, 96, 128
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, k), (experts, k, n))]
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def temporary_bytes(function):
        memory = jax.jit(function).lower(*shapes, sizes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    def gradients(lhs, rhs, sizes):
        return grouped_gradients(lhs, rhs, sizes, jnp.ones((rows, n), dtype))

    assert temporary_bytes(grouped_matmul) < experts * k * n * dtype.dtype.itemsize / 2
    assert temporary_bytes(gradients) < experts * k * n * 4


@pytest.mark.parametrize(("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "triton"), ("rocm", "ragged_dot")])
def test_each_platform_gets_its_kernel(platform, call):
    traced = jax.jit(output_and_gradients).trace(*arrays([3, 5], jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert call in text
    assert call not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_wrong_shapes_are_refused():
    lhs, rhs, sizes, _ = arrays([3, 5], jnp.float32)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(lhs[:, :-1], rhs, sizes)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(lhs, rhs, sizes[:1])

"""grouped_matmul gives the numbers and gradients of the reference and does the work of the chosen experts only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels import reference
from gemma4_jax.kernels.grouped_matmul import grouped_matmul

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


def output_and_gradients(function, lhs, rhs, sizes, d_out):
    out, pullback = jax.vjp(lambda a, b: function(a, b, sizes), lhs, rhs)
    return (out, *pullback(d_out))


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
        return [output_and_gradients(f, lhs, rhs, sizes, d_out) for f in (grouped_matmul, reference.grouped_matmul)]

    for sizes in SIZES[name]:
        got, wanted = both(*arrays(sizes, dtype))
        assert_close(got, wanted, dtype)
    assert len(traced) == 1


def test_composes_with_scan_and_checkpoint():
    lhs, rhs, sizes, _ = arrays([3, 0, 5], jnp.float32, k=6, n=6)
    stacked = jnp.stack([rhs, rhs * 0.5])

    def loss(function, lhs, stacked):
        layer = jax.checkpoint(lambda x, w: (x + function(x, w, sizes), None))
        return (jax.lax.scan(layer, lhs, stacked)[0] ** 2).sum()

    got = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)(grouped_matmul, lhs, stacked)
    wanted = jax.grad(loss, argnums=(1, 2))(reference.grouped_matmul, lhs, stacked)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


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

    def loss(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes).astype(jnp.float32).sum()

    assert temporary_bytes(grouped_matmul) < experts * k * n * dtype.dtype.itemsize / 2
    assert temporary_bytes(jax.grad(loss, argnums=(0, 1))) < experts * k * n * 4


def test_other_platforms_get_ragged_dot():
    lhs, rhs, sizes, _ = arrays([3, 5], jnp.float32)
    gradient = jax.jit(jax.grad(lambda a, b: grouped_matmul(a, b, sizes).sum(), argnums=(0, 1)))
    assert "ragged_dot" in gradient.trace(lhs, rhs).lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" not in gradient.trace(lhs, rhs).lower(lowering_platforms=("cpu",)).as_text()


def test_wrong_shapes_are_refused():
    lhs, rhs, sizes, _ = arrays([3, 5], jnp.float32)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(lhs[:, :-1], rhs, sizes)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(lhs, rhs, sizes[:1])

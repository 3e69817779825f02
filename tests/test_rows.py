"""Rows of a 16-bit table: the same numbers and gradient as indexing, and no copy of the table in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels.slices import rows

INDEX = jnp.asarray([[3, 0, 3], [7, 1, 4999]], jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_their_gradient(dtype):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5000, 8)), dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), dtype)
    np.testing.assert_array_equal(np.asarray(rows(table, INDEX)), np.asarray(table)[np.asarray(INDEX)])
    ours, wanted = (
        jax.grad(lambda table, take=take: (take(table, INDEX) * weight).sum())(table)
        for take in (rows, lambda table, index: table[index])
    )
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
    assert (np.asarray(ours) != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_makes_no_copy_of_the_table(dtype):
    """What decoding does: the next row is known only when this one has been read."""

    def last(table, index, steps):
        def step(_, index):
            return (rows(table, index).astype(jnp.float32).sum(-1) * 1e3).astype(jnp.int32) % 5000

        return jax.lax.fori_loop(0, steps, step, index)

    table = jax.ShapeDtypeStruct((5000, 256), dtype)
    compiled = jax.jit(last).lower(table, jax.ShapeDtypeStruct((4,), jnp.int32), jnp.int32(9)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 100_000  # the table is 2.6 MB or more

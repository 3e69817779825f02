"""The grouped products on an NVIDIA GPU, as Pallas-Triton kernels.

`jax.lax.ragged_dot` would do without a kernel of ours, but XLA makes a dense product of it there: every row by every
expert, with the rows copied once per expert (compiled for an H100, jax 0.10.2: 8,192 rows, 16 experts of [2816, 1408] bf16
take 0.78 GB forward and 2.2 GB backward, 16 times the FLOPs; 65,536 rows and 128 experts would take 47 GB).
"""

import jax
import jax.numpy as jnp

from gemma4_jax.kernels.grouped_tpu import visits

ROWS, COLUMNS, INNER = 128, 128, 64
"""One program's block of the result, and how much of the contracted dim it reads at a time: what a plain bf16 product on
an H100 takes in Triton's own tutorial. Not measured here."""


def matmul(
    lhs_MK: jax.Array, rhs: jax.Array, sizes_E: jax.Array, *, transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Row m times the matrix of its expert: [M, N] in lhs's dtype, zeros in rows past the sum of the sizes.

    rhs is [E, K, N], or [E, N, K] if `transposed`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, k), experts = lhs_MK.shape, rhs.shape[0]
    n = rhs.shape[1] if transposed else rhs.shape[2]
    lhs = jnp.pad(lhs_MK, ((0, -rows % ROWS), (0, 0)))
    schedule, _ = visits(sizes_E, lhs.shape[0], ROWS, tail=True)

    def kernel(group_V, tile_V, begin_V, end_V, lhs_ref, rhs_ref, out_ref):
        v, first = pl.program_id(0), pl.program_id(1) * COLUMNS
        group, row = group_V[v], tile_V[v] * ROWS
        in_n = first + jnp.arange(COLUMNS) < n
        e = jnp.minimum(group, experts - 1)

        def step(i, total):
            at = i * INNER
            in_k = at + jnp.arange(INNER) < k
            a = triton.load(lhs_ref.at[pl.ds(row, ROWS), pl.ds(at, INNER)], mask=in_k[None, :], other=0.0)
            inner, columns = pl.ds(at, INNER), pl.ds(first, COLUMNS)
            if transposed:
                b = triton.load(rhs_ref.at[e, columns, inner], mask=in_n[:, None] & in_k[None, :], other=0.0).T
            else:
                b = triton.load(rhs_ref.at[e, inner, columns], mask=in_k[:, None] & in_n[None, :], other=0.0)
            return total + triton.dot(a, b)

        # The rows past the last expert's are one more group, which is all zeros.
        steps = (group < experts).astype(jnp.int32) * -(-k // INNER)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        r = jnp.arange(ROWS)
        mine = (r >= begin_V[v]) & (r < end_V[v])
        at = out_ref.at[pl.ds(row, ROWS), pl.ds(first, COLUMNS)]
        triton.store(at, total.astype(out_ref.dtype), mask=mine[:, None] & in_n[None, :])

    return pl.pallas_call(
        kernel,
        name="grouped_matmul",
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], n), lhs.dtype),
        grid=(schedule[0].shape[0], -(-n // COLUMNS)),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(*schedule, lhs, rhs)[:rows]


def outer(lhs_MK: jax.Array, rhs_MN: jax.Array, sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """For each expert the sum over its rows of lhs_m rhs_m^T: [E, K, N] in lhs's dtype, summed in float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    k, n, experts = lhs_MK.shape[1], rhs_MN.shape[1], sizes_E.shape[0]
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)

    def kernel(begin_E, end_E, lhs_ref, rhs_ref, out_ref):
        e, inner, first = pl.program_id(0), pl.program_id(1) * ROWS, pl.program_id(2) * COLUMNS
        begin, end = begin_E[e], end_E[e]
        in_k, in_n = inner + jnp.arange(ROWS) < k, first + jnp.arange(COLUMNS) < n

        def step(i, total):
            at = begin + i * INNER
            mine = at + jnp.arange(INNER) < end
            a = triton.load(
                lhs_ref.at[pl.ds(at, INNER), pl.ds(inner, ROWS)], mask=mine[:, None] & in_k[None, :], other=0.0
            )
            b = triton.load(
                rhs_ref.at[pl.ds(at, INNER), pl.ds(first, COLUMNS)], mask=mine[:, None] & in_n[None, :], other=0.0
            )
            return total + triton.dot(a.T, b)

        zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        total = jax.lax.fori_loop(0, (end - begin + INNER - 1) // INNER, step, zeros)
        at = out_ref.at[e, pl.ds(inner, ROWS), pl.ds(first, COLUMNS)]
        triton.store(at, total.astype(out_ref.dtype), mask=in_k[:, None] & in_n[None, :])

    return pl.pallas_call(
        kernel,
        name="grouped_outer",
        out_shape=jax.ShapeDtypeStruct((experts, k, n), lhs_MK.dtype),
        grid=(experts, -(-k // ROWS), -(-n // COLUMNS)),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(ends - sizes_E, ends, lhs_MK, rhs_MN)

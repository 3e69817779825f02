"""One matrix per expert, rows sorted by expert: the product that makes a mixture of experts sparse.

On TPU and NVIDIA GPUs these are kernels of ours (`grouped_tpu`, `grouped_gpu`, which say why), on other GPUs
`jax.lax.ragged_dot`. On CPU that one multiplies every row by every expert (128 times the work for Gemma 4 26B), so there
the experts that have rows are visited one after the other, each in blocks of rows. The choice is made per platform when
the program is lowered, not from the machine that traces it: a program compiled here for a TPU gets the TPU's kernel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma4_jax.kernels import grouped_gpu, grouped_tpu
from gemma4_jax.kernels.slices import buffer, read, value, write

# Larger blocks were not faster on CPU (8,192 rows, 32 experts of [512, 512]: 128, 256 and 512 rows within 10 %).
MAX_ROWS = 128


def grouped_matmul(
    lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array, *, inputs_minor: bool = False
) -> jax.Array:
    """Row m of `lhs_MK` times the matrix of its expert: [M, N] in the dtype of `lhs_MK`.

    The first `group_sizes_E[0]` rows belong to expert 0, the next `group_sizes_E[1]` to expert 1, and so on; the sizes
    (int32, zeros allowed) sum to M or less. Rows past the sum give zeros; they must hold numbers (not nan). Products
    are summed in float32. `inputs_minor` says that XLA lays K out last on TPU (`grouped_gradients` too), which saves a copy of
    all matrices there. It has no derivative of its own.
    """
    _check(lhs_MK, rhs_EKN, group_sizes_E)
    if lhs_MK.shape[0] == 0:
        return jnp.zeros((0, rhs_EKN.shape[2]), lhs_MK.dtype)

    def tpu(lhs, rhs, sizes):
        rhs = jnp.swapaxes(rhs, 1, 2) if inputs_minor else rhs
        return grouped_tpu.matmul(lhs, rhs, sizes, transposed=inputs_minor)

    operands = lhs_MK, rhs_EKN, group_sizes_E
    return jax.lax.platform_dependent(
        *operands, cpu=_rows_times_experts, tpu=tpu, cuda=grouped_gpu.matmul, default=_ragged_dot
    )


def grouped_gradients(
    lhs_MK: jax.Array,
    rhs_EKN: jax.Array,
    group_sizes_E: jax.Array,
    d_out_MN: jax.Array,
    add_to_EKN: jax.Array | None = None,
    keep: jax.Array | None = None,
    *,
    inputs_minor: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of both matrices of `grouped_matmul`, [M, K] (zeros past the sum of the sizes) and [E, K, N].

    The second is added to `add_to_EKN`, if that is given, where `keep` (a bool scalar) is true; otherwise it only lends its
    memory. Rows of `d_out_MN` past the sum must hold numbers too.
    """
    _check(lhs_MK, rhs_EKN, group_sizes_E)
    if lhs_MK.shape[0] == 0:
        return jnp.zeros_like(lhs_MK), jnp.zeros_like(rhs_EKN)
    operands = lhs_MK, rhs_EKN, group_sizes_E, d_out_MN
    if add_to_EKN is not None and keep is not None:
        operands = *operands, add_to_EKN, keep

    def tpu(lhs, rhs, sizes, d_out, *add):
        add_to, keep = add or (jax.lax.empty(rhs.shape, rhs.dtype), jnp.array(False))
        if not inputs_minor:
            d_rhs = grouped_tpu.outer(lhs, d_out, sizes, add_to, keep)
            return grouped_tpu.matmul(d_out, rhs, sizes, transposed=True), d_rhs
        d_rhs = grouped_tpu.outer(d_out, lhs, sizes, jnp.swapaxes(add_to, 1, 2), keep)
        return grouped_tpu.matmul(d_out, jnp.swapaxes(rhs, 1, 2), sizes), jnp.swapaxes(d_rhs, 1, 2)

    def elsewhere(gradients, lhs, rhs, sizes, d_out, *add):
        d_lhs, d_rhs = gradients(lhs, rhs, sizes, d_out)
        if add:
            d_rhs = d_rhs + jnp.where(add[1], add[0], jnp.zeros_like(add[0]))
        return d_lhs, d_rhs

    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(elsewhere, _gradients),
        tpu=tpu,
        cuda=functools.partial(elsewhere, _gpu_gradients),
        default=functools.partial(elsewhere, _ragged_gradients),
    )


def _check(lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array) -> None:
    if lhs_MK.shape[1] != rhs_EKN.shape[1] or group_sizes_E.shape != rhs_EKN.shape[:1]:
        raise ValueError(
            "grouped_matmul wants lhs [M, K], rhs [E, K, N] and group_sizes [E], got "
            f"{lhs_MK.shape}, {rhs_EKN.shape} and {group_sizes_E.shape}"
        )


def _gpu_gradients(
    lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array, d_out_MN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    d_lhs = grouped_gpu.matmul(d_out_MN, rhs_EKN, group_sizes_E, transposed=True)
    return d_lhs, grouped_gpu.outer(lhs_MK, d_out_MN, group_sizes_E)


def _ragged_dot(lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    out = jax.lax.ragged_dot(lhs_MK, rhs_EKN, group_sizes_E, preferred_element_type=jnp.float32)
    return _zero_past(out, group_sizes_E).astype(lhs_MK.dtype)


def _ragged_gradients(
    lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array, d_out_MN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(lambda lhs, rhs: _ragged_dot(lhs, rhs, group_sizes_E), lhs_MK, rhs_EKN)
    return pullback(d_out_MN)


def _rows_times_experts(lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    rows, m = lhs_MK.shape[0], block_rows(lhs_MK.shape[0], rhs_EKN.shape[0])
    lhs = _padded(lhs_MK, m)

    def expert(e, begin, end, out):
        weight_KN = _weight(rhs_EKN, e)

        def block(row, out):
            # The tail of an expert's last block lands on rows of later experts, which overwrite it, or on the padding.
            return write(out, read(lhs, row, m) @ weight_KN, row)

        return _for_blocks(begin, end, m, block, out)

    out = jnp.zeros((lhs.shape[0], rhs_EKN.shape[2]), jnp.float32)
    out = _for_experts(group_sizes_E, expert, out)[:rows]
    return _zero_past(out, group_sizes_E).astype(lhs_MK.dtype)


def _gradients(
    lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array, d_out_MN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, m = lhs_MK.shape[0], block_rows(lhs_MK.shape[0], rhs_EKN.shape[0])
    lhs, d_out = _padded(lhs_MK, m), _padded(d_out_MN, m)

    def expert(e, begin, end, carry):
        d_lhs, d_rhs = carry
        weight_NK = _weight(rhs_EKN, e).T

        def block(row, carry):
            d_lhs, d_weight_KN = carry
            mine_m = row + jnp.arange(m, dtype=jnp.int32) < end
            d_rows = jnp.where(mine_m[:, None], read(d_out, row, m), 0.0)
            return write(d_lhs, d_rows @ weight_NK, row), d_weight_KN + read(lhs, row, m).T @ d_rows

        zeros_KN = jnp.zeros(rhs_EKN.shape[1:], jnp.float32)
        d_lhs, d_weight_KN = _for_blocks(begin, end, m, block, (d_lhs, zeros_KN))
        return d_lhs, write(d_rhs, d_weight_KN.astype(rhs_EKN.dtype)[None], e)

    zeros = jnp.zeros(lhs.shape, jnp.float32), buffer(rhs_EKN.shape, rhs_EKN.dtype)
    d_lhs, d_rhs = _for_experts(group_sizes_E, expert, zeros)
    return d_lhs[:rows].astype(lhs_MK.dtype), value(d_rhs, rhs_EKN.dtype)


def _weight(rhs_EKN: jax.Array, e: jax.Array) -> jax.Array:
    """One expert's matrix in float32, [K, N].

    The barrier ties the stack to the loop variable; without it XLA moves the reinterpretation of bfloat16 that `read`
    does out of the loop and copies every expert.
    """
    rhs_EKN, e = jax.lax.optimization_barrier((rhs_EKN, e))
    return read(rhs_EKN, e, 1)[0].astype(jnp.float32)


def _for_experts(group_sizes_E: jax.Array, body: Callable, carry):
    """carry = body(expert, its first row, its end row, carry), for experts that have rows, in ascending order."""
    sizes = group_sizes_E.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    busy_first = jnp.argsort(sizes == 0, stable=True)

    def step(i, carry):
        e = busy_first[i]
        return body(e, ends[e] - sizes[e], ends[e], carry)

    return jax.lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), step, carry)


def _for_blocks(begin: jax.Array, end: jax.Array, m: int, body: Callable, carry):
    """carry = body(row, carry) for row = begin, begin + m, ... below end."""
    return jax.lax.fori_loop(0, (end - begin + m - 1) // m, lambda i, carry: body(begin + i * m, carry), carry)


def block_rows(rows: int, experts: int) -> int:
    """Rows per block: the power of two at or above the mean number of rows per expert, at most MAX_ROWS."""
    mean = max(1, -(-rows // experts))
    return min(MAX_ROWS, 1 << (mean - 1).bit_length())


def _padded(x: jax.Array, m: int) -> jax.Array:
    """Float32 with m - 1 more rows, so that a block may begin at any row."""
    return jnp.pad(x.astype(jnp.float32), ((0, m - 1), (0, 0)))


def _zero_past(out_MN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    real_M = jax.lax.iota(jnp.int32, out_MN.shape[0]) < jnp.sum(group_sizes_E, dtype=jnp.int32)
    return jnp.where(real_M[:, None], out_MN, jnp.zeros_like(out_MN))

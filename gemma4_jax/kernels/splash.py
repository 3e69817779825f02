"""Splash attention on TPU: jax's own Pallas kernels, driven with our schedules, block sizes and residuals.

The kernels are those of `jax.experimental.pallas.ops.tpu.splash_attention`. Of its three layers only the two inner ones
are used, because the outer one does not fit: it evaluates a mask block by block in numpy (a [262144, 262144] mask
takes minutes; a schedule here takes milliseconds), it has no notion of queries that begin in the middle of the
keys, and its derivative hides the residuals that `sequence.py` shares with the other platforms.

A schedule says for each block of queries which blocks of keys the kernel visits. It is computed from slots alone:
causality and the window compare slots, padding and packing compare segment ids.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # importing Pallas for TPU takes half a second; the functions below import it when they run
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

Starts = tuple[tuple[int, ...], ...]
"""starts[c][p] is the key slot of the first query of piece p on device c; the pieces of a device have equal lengths."""

LANES = 128

# Numbers as large as float32 holds, with room for a subtraction; the kernel's own default.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)


def splash_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_ids_BT: jax.Array,
    k_ids_BS: jax.Array,
    window: int | None,
    starts: Starts = ((0,),),
    device: jax.Array | None = None,
    *,
    residuals: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention with scale 1, [B, T, N, H] in the dtype of q, and log-sum-exp, float32 [B, T, N] (None without `residuals`).

    A query sees the keys of its segment (int32 ids, equal) in its own slot and before it, at most `window` slots.
    `device` (int32 scalar) picks the row of `starts`. The length of a piece, S and H are multiples of 128. Every query
    must see a key; where keys and queries are the same tokens it sees its own.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    length, keys, head_dim = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    piece = length // len(starts[0])
    blocks = block_sizes(head_dim, q_BTNH.dtype.itemsize, window, piece, keys)
    visited = _schedule(starts, piece, keys, window, device)(blocks.forward_q, blocks.kv)

    def one(q_NTH, k_KSH, v_KSH, q_ids_T, k_ids_S):
        return kernels._splash_attention_forward(
            visited,
            q_NTH,
            k_KSH,
            v_KSH,
            kernels.SegmentIds(q_ids_T, k_ids_S),
            sinks=None,
            mask_value=HIDDEN,
            is_mqa=False,
            block_sizes=kernels.BlockSizes(blocks.forward_q, blocks.kv),
            residual_checkpoint_name=None,
            save_residuals=residuals,
            mask_function=_visible(window),
            interpret=interpret,
        )

    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    result: Any = jax.vmap(one)(q, k, v, q_ids_BT, k_ids_BS)
    if not residuals:
        return result.swapaxes(1, 2), None
    out_BNTH, (lse_BNT,) = result
    return out_BNTH.swapaxes(1, 2), lse_BNT.swapaxes(1, 2)


def splash_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_ids_BT: jax.Array,
    k_ids_BS: jax.Array,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    d_out_BTNH: jax.Array,
    window: int | None,
    starts: Starts = ((0,),),
    device: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v from what `splash_forward` returned, each in the shape and dtype of its array.

    Two kernels, one for dq and one for dk and dv. The fused kernel that jax has too writes S / block_kv copies of dq
    (16 of them, 4 GiB, for one sequence of 8192 with 32 heads of 512).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    length, keys, head_dim = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    piece = length // len(starts[0])
    _, rows, columns = block_sizes(head_dim, q_BTNH.dtype.itemsize, window, piece, keys)
    schedule = _schedule(starts, piece, keys, window, device)
    visited_dq, visited_dkv = schedule(rows, columns), schedule(rows, columns, by_key=True)
    sizes = kernels.BlockSizes(
        rows, columns, block_q_dq=rows, block_kv_dq=columns, block_q_dkv=rows, block_kv_dkv=columns
    )

    def one(q_NTH, k_KSH, v_KSH, q_ids_T, k_ids_S, out_NTH, lse_NT, d_out_NTH):
        ids = kernels.SegmentIds(q_ids_T, k_ids_S)
        kept = (q_NTH, k_KSH, v_KSH, ids, None, out_NTH, lse_NT, visited_dq, visited_dkv)
        gradients = kernels._splash_attention_bwd(
            save_residuals=False,
            mask_value=HIDDEN,
            is_mqa=False,
            block_sizes=sizes,
            residual_checkpoint_name=None,
            mask_function=_visible(window),
            attn_logits_soft_cap=None,
            interpret=interpret,
            res=kept,
            do=d_out_NTH,
        )
        return gradients[3:6]

    q, k, v, out, lse, d_out = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BTN, d_out_BTNH))
    dq, dk, dv = jax.vmap(one)(q, k, v, q_ids_BT, k_ids_BS, out, lse, d_out)
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


class Blocks(NamedTuple):
    """Rows of queries and of keys per step; the backward kernels share theirs."""

    forward_q: int
    q: int
    kv: int


def block_sizes(head_dim: int, itemsize: int, window: int | None, piece: int, keys: int) -> Blocks:
    """Blocks that divide the length of a piece of queries and the number of keys.

    Wanted are 512 x 512. Without a window the forward pass takes 1024 queries: it reads all keys anew for each block
    of queries, and 512 would ask HBM for more than v6e has per FLOP (it does 560 per byte). With a window longer
    blocks look at more keys in vain. Heads of 2 KiB (512 in float32) take half. All of these compile within the 16 MiB
    of VMEM that a kernel gets on v4, v5e and v5p; on v6e and tpu7x it gets more.
    """
    rows = 512 if head_dim * itemsize <= 1024 else 256
    return Blocks(_fit(rows if window is not None else 2 * rows, piece), _fit(rows, piece), _fit(rows, keys))


def visits(
    starts: Starts, piece: int, keys: int, window: int | None, block_q: int, block_kv: int, *, by_key: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which block comes next and whether it counts, for each device: integers [devices, blocks of queries, steps].

    `by_key` turns the question round: the blocks of queries for each block of keys, [devices, steps, blocks of keys].
    There are as many steps as the busiest block needs on any device. An idle step names the block that the next row begins with, so
    that it is fetched in time. The integers are as small as their values allow: a schedule has to fit into scalar memory (1 MiB).
    """
    first_q = np.array(starts)[:, :, None] + np.arange(0, piece, block_q)
    first_q = first_q.reshape(len(starts), -1, 1)
    first_k = np.arange(0, keys, block_kv)
    needed = first_k <= first_q + block_q - 1
    if window is not None:
        needed &= first_k + block_kv - 1 > first_q - window
    if by_key:
        needed = needed.swapaxes(1, 2)
    counts = needed.sum(axis=-1, keepdims=True)
    steps = max(1, counts.max())
    order = np.argsort(~needed, axis=-1, kind="stable")[..., :steps]
    active = np.arange(steps) < counts
    following = np.where(active, order, np.roll(order[..., :1], -1, axis=1))
    small = following.astype(np.min_scalar_type(-1 - int(following.max())))
    if by_key:
        small, active = small.swapaxes(1, 2), active.swapaxes(1, 2)
    return small, active.astype(np.int8)


def _schedule(starts: Starts, piece: int, keys: int, window: int | None, device: jax.Array | None):
    """Function of the blocks (and `by_key`) that gives the kernel's MaskInfo for this device."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    slots = (np.array(starts, np.int32)[:, :, None] + np.arange(piece, dtype=np.int32)).reshape(len(starts), -1)

    def mine(table: np.ndarray) -> Any:
        return jnp.asarray(table[0]) if device is None else jnp.asarray(table)[device]

    def schedule(block_q: int, block_kv: int, *, by_key: bool = False) -> "MaskInfo":
        following, active = visits(starts, piece, keys, window, block_q, block_kv, by_key=by_key)
        return MaskInfo(
            data_next=mine(following)[None],
            mask_next=None,
            block_mask=mine(active)[None],
            partial_mask_blocks=None,
            q_sequence=mine(slots),
        )

    return schedule


@functools.cache
def _visible(window: int | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Which query slots see which key slots: what the kernel computes in each block."""
    if window is None:
        return lambda q_slot, k_slot: q_slot >= k_slot
    return lambda q_slot, k_slot: (q_slot >= k_slot) & (q_slot - window < k_slot)


def _fit(wanted: int, length: int) -> int:
    """The largest multiple of 128 up to `wanted` that divides `length`."""
    return next(rows for rows in range(wanted, 0, -LANES) if length % rows == 0)

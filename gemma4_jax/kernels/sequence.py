"""Attention of a sequence, or of one device's share of it, on itself: splash on TPU, XLA elsewhere, one derivative.

Both platforms' kernels keep the same residuals: q, k, v, the output and one float32 number per query and head. So the choice of
platform stays inside the two passes, where lowering resolves it; if the choice had the derivatives inside, every
program would carry the residuals of both. The output and that number are named ATTENTION for remat policies: a policy that
keeps them saves the second forward pass through attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.kernels import blockwise, chunked
from gemma4_jax.kernels.banded import banded_spans, block_rows
from gemma4_jax.kernels.blockwise import Labels, Span, causal_spans
from gemma4_jax.kernels.choice import Shape, kernel_choice
from gemma4_jax.kernels.splash import Starts, splash_backward, splash_forward

ATTENTION = "attention"

# Of padding, which sees only padding. No segment has this id.
PADDING = int(np.iinfo(np.int32).min)


class Place(NamedTuple):
    """Where the queries stand among the keys: the window, `starts` as in `splash.py`, and how many slots ahead they see."""

    window: int | None
    starts: Starts
    ahead: int = 0


def sequence_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    labels: Labels,
    *,
    window: int | None,
    starts: Starts = ((0,),),
    device: jax.Array | None = None,
    ahead: int = 0,
) -> jax.Array:
    """Same numbers as `reference.attention` for the tokens of one sequence and its keys; [B, T, N, H], zeros for padding.

    Contract: query and key of a slot belong to the same token, and inside one segment the valid tokens stand in
    consecutive slots with positions growing by one. Padding (position -1) may stand before, after or between segments;
    T is any length. Then a distance in positions is a distance in slots, and a window is a band of the matrix.
    Keys may be more than queries: `starts[device]` gives the key slot of the first query of each of its pieces.
    `labels.q_last_BT` may lie up to `ahead` positions after the query's own; splash does not know it, so XLA's kernels run.
    """
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if keys != length and starts == ((0,),):
        raise ValueError(
            f"sequence_attention wants as many keys as queries, or starts, got {keys} keys and {length} queries; use "
            "chunked_attention for queries against a cache"
        )
    if window is not None and window < 1:
        raise ValueError(f"window counts the query itself and must be at least 1, got {window}")
    if (labels.q_last_BT is None) != (ahead == 0):
        raise ValueError(f"labels.q_last_BT and ahead go together, got {labels.q_last_BT} and {ahead}")
    return _attend(Place(window, starts, ahead), q_BTNH, k_BSKH, v_BSKH, labels, device)


def spans(place: Place, length: int, keys: int) -> tuple[Span, ...]:
    """The blocks of the XLA kernels.

    Where a query stands is known here only if every device has its queries in the same slots; else each block of
    queries looks at all keys, and positions hide those after it.
    """
    window, starts, ahead = place
    if keys == length:
        if window is None or length <= window:
            return causal_spans(length, chunked.CHUNK, ahead)
        return banded_spans(length, window, block_rows(window), ahead)
    firsts = [slot for device in starts for slot in device]
    if window is None or ahead or len(firsts) > 1 or firsts[0] < window - 1:
        return chunked.full_spans(length, keys, chunked.CHUNK)
    first = firsts[0] - (window - 1)
    rows = min(length, block_rows(window))
    whole, rest = divmod(length, rows)
    blocks = [Span(0, rows, whole, first, rows, window - 1 + rows)]
    if rest:
        blocks.append(Span(whole * rows, rest, 1, first + whole * rows, 0, window - 1 + rest))
    return tuple(blocks)


def partial_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, labels: Labels, *, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Attention to some of the keys, and log-sum-exp float32 [B, T, N] to weigh it with: -1e20 where no key is seen.

    The keys may lie in any order (a cache). For inference: it has no derivative of its own.
    """
    blocks = chunked.full_spans(q_BTNH.shape[1], k_BSKH.shape[1], chunked.CHUNK)
    return _xla_forward(blocks, window, q_BTNH, k_BSKH, v_BSKH, labels)


def _primal(place: Place, q, k, v, labels: Labels, device) -> jax.Array:
    blocks = spans(place, q.shape[1], k.shape[1])

    def splash(q, k, v, labels, device):
        out, _ = splash_forward(q, k, v, *_ids(labels), place.window, place.starts, device, residuals=False)
        return _only_tokens(out, labels)

    def xla(q, k, v, labels, device):
        return _xla_forward(blocks, place.window, q, k, v, labels)[0]

    return _by_platform(place, splash, xla, q, k, v, labels, device)


def _forward(place: Place, q, k, v, labels: Labels, device) -> tuple[jax.Array, tuple]:
    blocks = spans(place, q.shape[1], k.shape[1])

    def splash(q, k, v, labels, device):
        out, lse = splash_forward(q, k, v, *_ids(labels), place.window, place.starts, device)
        return _only_tokens(out, labels), lse

    def xla(q, k, v, labels, device):
        return _xla_forward(blocks, place.window, q, k, v, labels)

    out, lse = _by_platform(place, splash, xla, q, k, v, labels, device)
    out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
    return out, (q, k, v, labels, device, out, lse)


def _backward(place: Place, residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, *_ = residuals
    blocks = spans(place, q.shape[1], k.shape[1])

    def splash(q, k, v, labels, device, out, lse, d_out):
        d_out = _only_tokens(d_out, labels)
        return splash_backward(q, k, v, *_ids(labels), out, lse, d_out, place.window, place.starts, device)

    def xla(q, k, v, labels, device, out, lse, d_out):
        q, out, lse, d_out = (_grouped(x, k.shape[2]) for x in (q, out, lse, d_out))
        kept = (q, k.swapaxes(1, 2), v.swapaxes(1, 2), labels, out, lse)
        dq, dk, dv, _ = blockwise.backward(blocks, place.window, kept, d_out)
        return _ungrouped(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)

    return *_by_platform(place, splash, xla, *residuals, d_out), None, None


_attend = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _by_platform(place: Place, splash: Callable, xla: Callable, q_BTNH: jax.Array, k_BSKH: jax.Array, *rest):
    """One of the two functions of the arrays; the program is lowered with the one that the table names."""
    length = q_BTNH.shape[1] // len(place.starts[0])
    shape = Shape(length, k_BSKH.shape[1], q_BTNH.shape[3], place.window, aligned=True, ahead=place.ahead)
    if kernel_choice("tpu", shape) != "splash":
        return xla(q_BTNH, k_BSKH, *rest)
    return jax.lax.platform_dependent(q_BTNH, k_BSKH, *rest, tpu=splash, default=xla)


def _xla_forward(blocks: tuple[Span, ...], window: int | None, q, k, v, labels: Labels) -> tuple[jax.Array, jax.Array]:
    arrays = _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out, residuals = blockwise.forward(blocks, window, *arrays, labels)
    return _ungrouped(out), _ungrouped(residuals[-1])


def _grouped(x_BTN: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, ...] as [B, K, T, G, ...], what `blockwise.py` works on."""
    batch, length, heads, *rest = x_BTN.shape
    return x_BTN.reshape(batch, length, kv_heads, heads // kv_heads, *rest).swapaxes(1, 2)


def _ungrouped(x_BKTG: jax.Array) -> jax.Array:
    batch, kv_heads, length, groups, *rest = x_BKTG.shape
    return x_BKTG.swapaxes(1, 2).reshape(batch, length, kv_heads * groups, *rest)


def _ids(labels: Labels) -> tuple[jax.Array, jax.Array]:
    """Segment ids of queries and keys for splash: padding has one of its own, all tokens one if there are no segments."""

    def ids(positions, segment_ids):
        return jnp.where(positions >= 0, 0 if segment_ids is None else segment_ids, PADDING)

    if labels.q_seg_BT is None or labels.k_seg_BS is None:
        return ids(labels.q_pos_BT, None), ids(labels.k_pos_BS, None)
    return ids(labels.q_pos_BT, labels.q_seg_BT), ids(labels.k_pos_BS, labels.k_seg_BS)


def _only_tokens(x_BTNH: jax.Array, labels: Labels) -> jax.Array:
    """Zeros at padding, where splash lets padding see padding."""
    return jnp.where(labels.q_pos_BT[:, :, None, None] >= 0, x_BTNH, jnp.zeros((), x_BTNH.dtype))

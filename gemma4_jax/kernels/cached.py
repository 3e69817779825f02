"""Attention to what a cache holds, in blocks of slots up to the newest token: work follows the text, not the cache's size.

Key/value heads stand before slots, so that every product is a plain matrix product per (row, head) and no step turns a cache
round: with slots first, one decoding step of a 12-layer model on CPU copied its whole cache. Numbers may be stored in 8 bits with
a scale per token and head; the scale multiplies scores and probabilities, so no full copy of the cache in the compute dtype exists.

For inference: no derivative is defined.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.kernels.blockwise import FLOOR, HIDDEN
from gemma4_jax.kernels.slices import moved

BLOCK, STEP_BLOCK = 512, 128
"""Slots looked at together, by many queries and by few. A token's slot is its position modulo the number of slots, so slots
beyond the newest position are empty, in a ring too."""

ROWS = 128
"""Queries taken together, as in `chunked.py`."""


class Codes(NamedTuple):
    """Stored vectors [B, K, S, W] of any dtype, and what multiplies each, float32 [B, K, S] (None: nothing)."""

    values: jax.Array
    scale: jax.Array | None = None

    def read(self, start: int | jax.Array, size: int, rows: jax.Array | None) -> "Codes":
        """`size` slots from `start` of all rows, or of the named ones [P]."""
        scale = None if self.scale is None else _slots(self.scale, start, size, rows)
        return Codes(_slots(self.values, start, size, rows), scale)


class Fresh(NamedTuple):
    """Tokens that are looked at before they are stored: parts [B, K, T, W], positions [B, T]."""

    parts: dict[str, Codes]
    positions: jax.Array


Keys = Callable[[dict[str, Codes], jax.Array], tuple[Codes, ...]]
"""The keys of a block, in as many parts as the queries have, from what is stored of it and its positions [B, s]."""


def cached_attention(
    queries_BTNW: tuple[jax.Array, ...],
    parts: dict[str, Codes],
    keys: Keys,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    *,
    window: int | None,
    first: int | jax.Array = 0,
    rows: jax.Array | None = None,
    fresh: "Fresh | None" = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(sum over parts of q . k) v: [B, T, N, W of the values], and its log-sum-exp float32 [B, T, N] (-1e20: no key seen).

    Args:
      queries_BTNW: parts of the queries, whose products with the keys' parts add up to the scores; scale 1.
      parts: what is stored, with the values under "v".
      keys: see `Keys`.
      q_pos_BT: positions of the queries, -1 idle.
      k_pos_BS: positions in the slots, -1 empty, of the same rows as the queries.
      window: keys a query sees, itself included; None: all before it.
      first: the place of slot 0 among all slots of the cache, where that is cut over devices.
      rows: which rows of the stored arrays the queries belong to; None: query row b is stored row b.
      fresh: tokens that are not stored yet.
    """
    length, slots = q_pos_BT.shape[1], parts["v"].values.shape[2]
    size = min(slots, BLOCK if length > 16 else STEP_BLOCK)
    step = ROWS if length > ROWS and length % ROWS == 0 else length

    def rows_of_queries(at: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        queries = tuple(_grouped(_time(q, at, step), parts["v"].values.shape[1]) for q in queries_BTNW)
        q_pos = _time(q_pos_BT, at, step)

        def block(i: int | jax.Array, carry: "_Sums | None") -> _Sums:
            start = i * size if isinstance(i, int) else jnp.minimum(i * size, slots - size)
            here = {name: codes.read(start, size, rows) for name, codes in parts.items()}
            k_pos = jax.lax.dynamic_slice_in_dim(k_pos_BS, start, size, 1)
            slot = start + jnp.arange(size, dtype=jnp.int32)
            bias = _bias(q_pos, jnp.where(slot >= i * size, k_pos, -1), window)
            return _add(carry, queries, keys(here, k_pos), here["v"], bias)

        if size == slots:
            sums = block(0, None)
        else:
            newest = jnp.max(q_pos) + 1 - first
            blocks = jnp.clip((newest + size - 1) // size, 0, -(-slots // size))
            sums = jax.lax.fori_loop(0, blocks, block, _nothing(queries, parts["v"]))
        if fresh is not None:
            sums = _add(sums, queries, keys(*fresh), fresh.parts["v"], _bias(q_pos, fresh.positions, window))
        return _finished(sums, queries[0].dtype, step)

    if step == length:
        return rows_of_queries(0)
    blocks = jax.lax.map(rows_of_queries, jnp.arange(0, length, step, dtype=jnp.int32))
    joined = (jnp.moveaxis(x, 0, 1) for x in blocks)
    out, lse = (x.reshape(x.shape[0], length, *x.shape[3:]) for x in joined)
    return out, lse


class _Sums(NamedTuple):
    """Of softmax so far, per query: largest score and sum of weights [B, K, R], weighted values [B, K, R, H]; R = T * G."""

    top: jax.Array
    total: jax.Array
    values: jax.Array


def _nothing(queries: tuple[jax.Array, ...], values: Codes) -> _Sums:
    shape = queries[0].shape[:3]
    zeros = jnp.zeros(shape, jnp.float32)
    return _Sums(zeros + FLOOR, zeros, jnp.zeros((*shape, values.values.shape[-1]), jnp.float32))


def _add(sums: _Sums | None, queries, keys: tuple[Codes, ...], values: Codes, bias_BTS: jax.Array) -> _Sums:
    """The softmax sums with one more block of keys."""
    scores: Any = None
    for q, key in zip(queries, keys, strict=True):
        part = jnp.einsum("BKRW,BKSW->BKRS", q, key.values.astype(q.dtype), preferred_element_type=jnp.float32)
        part = part if key.scale is None else part * key.scale[:, :, None]
        scores = part if scores is None else scores + part
    batch, heads, count, size = scores.shape
    length = bias_BTS.shape[1]
    scores = scores.reshape(batch, heads, length, count // length, size) + bias_BTS[:, None, :, None]
    scores = scores.reshape(batch, heads, count, size)
    top = jnp.maximum(scores.max(axis=-1), FLOOR if sums is None else sums.top)
    p = jnp.exp(scores - top[..., None])
    total = p.sum(axis=-1)
    weights = p if values.scale is None else p * values.scale[:, :, None]
    dtype = queries[0].dtype
    out = jnp.einsum(
        "BKRS,BKSW->BKRW", weights.astype(dtype), values.values.astype(dtype), preferred_element_type=jnp.float32
    )
    if sums is None:
        return _Sums(top, total, out)
    fade = jnp.exp(sums.top - top)
    return _Sums(top, sums.total * fade + total, sums.values * fade[..., None] + out)


def _finished(sums: _Sums, dtype: jax.typing.DTypeLike, length: int) -> tuple[jax.Array, jax.Array]:
    total = jnp.where(sums.total > 0, sums.total, 1.0)
    out = (sums.values / total[..., None]).astype(dtype)
    return _ungrouped(out, length), _ungrouped((sums.top + jnp.log(total))[..., None], length)[..., 0]


def _grouped(x_BTNW: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, W] as [B, K, T * G, W]."""
    batch, length, heads, width = x_BTNW.shape
    split = x_BTNW.reshape(batch, length, kv_heads, heads // kv_heads, width).swapaxes(1, 2)
    return split.reshape(batch, kv_heads, -1, width)


def _ungrouped(x_BKRW: jax.Array, length: int) -> jax.Array:
    batch, kv_heads, count, width = x_BKRW.shape
    split = x_BKRW.reshape(batch, kv_heads, length, count // length, width).swapaxes(1, 2)
    return split.reshape(batch, length, -1, width)


def _bias(q_pos_BT: jax.Array, k_pos_BS: jax.Array, window: int | None) -> jax.Array:
    q, k = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    visible = (q >= 0) & (k >= 0) & (k <= q)
    if window is not None:
        visible &= k > q - window
    return jnp.where(visible, jnp.float32(0.0), jnp.float32(HIDDEN))


def _time(x_BT: jax.Array, at: int | jax.Array, size: int) -> jax.Array:
    return x_BT if x_BT.shape[1] == size else jax.lax.dynamic_slice_in_dim(x_BT, at, size, 1)


def _slots(x_BKS: jax.Array, start: int | jax.Array, size: int, rows: jax.Array | None) -> jax.Array:
    if rows is None and x_BKS.shape[2] == size:
        return x_BKS
    if rows is None:
        return moved(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 2), x_BKS)
    rest = (0,) * (x_BKS.ndim - 3)

    def of_rows(x: jax.Array) -> jax.Array:
        def one(row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, 0, start, *rest), (1, x.shape[1], size, *x.shape[3:]))[0]

        return one(rows[0])[None] if rows.shape[0] == 1 else jax.vmap(one)(rows)

    return moved(of_rows, x_BKS)

"""Sliding-window attention whose memory and FLOPs grow with T x window, not with T x T.

A block of C queries that starts in slot s can only see the slots [s - (window - 1), s + C): one slice of the keys.
Blocks far from the start all have slices of one length and run as one loop; those before them look at keys from slot 0.
"""

import jax

from gemma4_jax.kernels.blockwise import Labels, Span, blockwise_attention, causal_spans


def banded_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None = None,
    k_seg_BS: jax.Array | None = None,
    *,
    window: int,
) -> jax.Array:
    """Same numbers as `reference.attention` for queries and keys of one sequence (T == S); [B, T, N, H].

    Contract: query and key of a slot belong to the same token, and inside one segment the valid tokens stand in
    consecutive slots with positions growing by one. Padding (position -1) may stand before, after or between segments;
    T is any length. Then a distance in positions is a distance in slots, and the window is a band of the matrix.
    """
    length = q_BTNH.shape[1]
    if k_BSKH.shape[1] != length:
        raise ValueError(
            f"banded_attention wants as many keys as queries, got {k_BSKH.shape[1]} keys and {length} queries; "
            "use chunked_attention for queries against a cache"
        )
    if window < 1:
        raise ValueError(f"window counts the query itself and must be at least 1, got {window}")
    labels = Labels(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
    spans = banded_spans(length, window, block_rows(window))
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, labels, spans=spans, window=window)


def block_rows(window: int) -> int:
    """Queries per block: a quarter of the window, so that a slice holds 1.25 windows, within 64 to 256.

    Below 64 rows the matrix products are too small to be fast; above 256 the scores of a block outgrow the caches.
    """
    return min(256, max(64, window // 4))


def banded_spans(length: int, window: int, rows: int) -> tuple[Span, ...]:
    """The blocks whose slice would begin before slot 0, the whole blocks after them, and the rest of the last block."""
    whole, rest = divmod(length, rows)
    back = window - 1
    ramp = min(whole, -(-back // rows))
    spans = list(causal_spans(ramp * rows, rows))
    if whole > ramp:
        spans.append(Span(ramp * rows, rows, whole - ramp, ramp * rows - back, rows, back + rows))
    if rest:
        first_key = max(0, whole * rows - back)
        spans.append(Span(whole * rows, rest, 1, first_key, 0, length - first_key))
    return tuple(spans)

"""Causal attention over a whole sequence or a cache that never holds a [T, S] matrix.

Queries are taken `chunk` at a time. When T == S (training, prefill of a whole prompt) a query in slot i sees no key in
a later slot, so a chunk looks at little more than the keys before its own end (`blockwise.causal_spans`).
"""

import jax

from gemma4_jax.kernels.blockwise import Labels, Span, blockwise_attention, causal_spans

# 64, 128 and 256 rows were measured on CPU at [2, 512..2048, 8 heads, 2 kv heads, 128..256]; 128 was never far off.
CHUNK = 128


def chunked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None = None,
    k_seg_BS: jax.Array | None = None,
    q_last_BT: jax.Array | None = None,
    *,
    window: int | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """Same numbers as `reference.attention`, in O(chunk x S) memory forward and backward; [B, T, N, H].

    When T == S the keys must be those of the queries, in the same slots, positions growing with the slot inside each
    segment (padding, position -1, may stand anywhere). When T != S (decoding, prefill into a cache) keys may lie in
    any order, a ring included, and all of them are looked at; so they are with `q_last_BT` (`Labels`). With `window` the mask
    is applied but no work is saved: `sequence.sequence_attention` is for that.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 query, got {chunk}")
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    aligned = length == keys and q_last_BT is None
    spans = causal_spans(length, chunk) if aligned else full_spans(length, keys, chunk)
    labels = Labels(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, q_last_BT)
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, labels, spans=spans, window=window)


def full_spans(length: int, keys: int, chunk: int) -> tuple[Span, ...]:
    """Chunks that each look at every key; the last one is shorter when `chunk` does not divide the length."""
    whole, rest = divmod(length, chunk)
    spans = [Span(0, chunk, whole, 0, 0, keys)] if whole else []
    if rest:
        spans.append(Span(whole * chunk, rest, 1, 0, 0, keys))
    return tuple(spans)

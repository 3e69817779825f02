"""Which attention kernel runs: the one table of choices."""

import jax

from gemma4_jax.kernels.banded import banded_attention
from gemma4_jax.kernels.chunked import chunked_attention
from gemma4_jax.model.kv import KV


def attend(
    q_BTNH: jax.Array, kv: KV, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, window: int | None
) -> jax.Array:
    """softmax(q k^T) v over the keys each query may see; scale 1, no soft cap; shape and dtype of q.

    | queries                          | window | kernel                                     |
    |----------------------------------|--------|--------------------------------------------|
    | the keys' own tokens, T > window | yes    | banded: O(T x window)                      |
    | anything else                    | any    | chunked over queries: never [T, S] at once |
    """
    places = (positions_BT, kv.positions, segment_ids_BT, kv.segment_ids)
    if window is not None and kv.aligned and q_BTNH.shape[1] > window:
        return banded_attention(q_BTNH, kv.k, kv.v, *places, window=window)
    return chunked_attention(q_BTNH, kv.k, kv.v, *places, window=window)

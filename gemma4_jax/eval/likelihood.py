"""How likely a model holds given continuations: what multiple-choice benchmarks compare."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.model.transformer import Transformer

CHUNK = 128
"""Tokens whose logits exist at a time."""
SHORTEST = 32
"""Batches have a power of two of tokens a row, at least this many, so that few programs are compiled."""


def continuation_scores(
    model: Transformer, sequences: Sequence[tuple[Sequence[int], int]], batch_size: int = 8
) -> list[tuple[float, bool]]:
    """(log-probability of the tokens from `start` on, whether each of them is the likeliest) of each (tokens, start).

    Rows of a batch are of like length. `start` is at least 1: the first token has nothing before it.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        longest = len(sequences[members[0]][0]) - 1
        length = max(SHORTEST, 1 << (longest - 1).bit_length()) if longest > 0 else SHORTEST
        tokens, targets = (np.zeros((batch_size, length), np.int32) for _ in range(2))
        positions = np.full((batch_size, length), -1, np.int32)
        wanted = np.zeros((batch_size, length), bool)
        for row, index in enumerate(members):
            ids, start = np.asarray(sequences[index][0], np.int32), max(1, sequences[index][1])
            count = len(ids) - 1
            tokens[row, :count], targets[row, :count], positions[row, :count] = ids[:-1], ids[1:], np.arange(count)
            wanted[row, start - 1 : count] = True
        logprob, greedy = jax.device_get(_scores(model, tokens, targets, positions, wanted))
        for row, index in enumerate(members):
            found[index] = float(logprob[row]), bool(greedy[row])
    return found


@jax.jit
def _scores(
    model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array, positions_BT: jax.Array, wanted_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each row the sum of log-probabilities float32 [B] and whether all wanted targets are the likeliest [B]."""
    hidden = model.hidden(tokens_BT, positions_BT)
    size = min(CHUNK, hidden.shape[1])

    def chunk(parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BCD, targets_BC = parts
        logits = model.logits(h_BCD)
        picked = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets_BC

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    logprob, likeliest = jax.lax.map(chunk, (chunks(hidden), chunks(targets_BT)))
    logprob, likeliest = (jnp.moveaxis(x, 0, 1).reshape(targets_BT.shape) for x in (logprob, likeliest))
    return jnp.sum(jnp.where(wanted_BT, logprob, 0.0), axis=-1), jnp.all(likeliest | ~wanted_BT, axis=-1)

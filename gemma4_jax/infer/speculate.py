"""Several tokens for one reading of the weights: a drafter guesses what comes next, one forward pass of the model judges it.

A round guesses `count` tokens for every slot and sends them behind the slot's newest token through the model, which then chooses
each place's token as it would have chosen it alone: from its own logits, with the random numbers of the request, of its stream and
of that place. Guesses count as long as they are the tokens so chosen, and the first choice that differs is a token too. So what a
request gets is what it gets without a drafter, greedy or drawn, token by token; its distribution is the model's whatever the
drafter says. (As far as a pass over several tokens rounds as a pass over one: in bfloat16 near ties may fall the other way.)

The drafter draws by the same rule with the same random numbers: were its logits the model's, every guess would hold.

Guesses that do not hold leave the cache: their slots are empty again (`kv.forget`), and the rings of sliding layers have slots
to spare, so that nothing a later token sees was overwritten for them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import LayerKind
from gemma4_jax.infer.sampler import choose
from gemma4_jax.infer.steps import NOTHING, STEPS, Controls, Masks, Progress, of_rows
from gemma4_jax.model.decode import Decoder, view_of
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.kv import Cache, forget, producers
from gemma4_jax.model.layouts import CacheFormat, View


class Verdict(NamedTuple):
    """Of the rounds so far, int32 [P]: guesses made, those that held, and rounds that met one that did not."""

    drafted: jax.Array
    accepted: jax.Array
    rejected: jax.Array


@functools.partial(jax.jit, static_argnames=("count", "cache_format"), donate_argnames=("cache", "progress"))
def draft_steps(
    decoder: Decoder,
    drafter: Drafter,
    cache: Cache,
    progress: Progress,
    controls: Controls,
    ended_B: np.ndarray,
    masks: Masks,
    most_B: np.ndarray,
    rounds: np.ndarray,
    eager: np.ndarray,
    rows: np.ndarray | None,
    *,
    count: int,
    cache_format: CacheFormat,
) -> tuple[Cache, Progress, jax.Array, jax.Array, Verdict]:
    """Up to `rounds` (at most STEPS) rounds for every slot that is not done; the others as `steps.decode_steps`.

    Args:
      drafter: its weights in the decoder's dtype.
      most_B: int32, guesses a slot may get, 0 for one whose masks change with every token; a call with masks takes one round.
      count: guesses of a round; 0 takes single tokens, as `decode_steps` does.

    Returns:
      Cache and progress, tokens [P, STEPS, count + 1] (-1: none) and their log-probabilities, and the verdict.
    """
    whole = dataclasses.replace(progress, done=progress.done | ended_B)
    progress, most = whole, jnp.asarray(most_B)
    if rows is not None:
        at = jnp.asarray(rows)
        progress, controls, masks, most = of_rows((progress, controls, masks, most), at)
    keys, before = controls.keys(), progress.done

    def goes_on(carry):
        done = carry[2].done
        return (carry[0] < rounds) & ~done.all() & ~(eager & (done & ~before).any())

    def one_round(carry):
        number, cache, progress, tokens, logprobs, verdict = carry
        guesses = _guesses(decoder, drafter, cache, progress, controls, keys, rows, count, cache_format)
        cache, progress, new, values, judged = _judged(
            decoder, cache, progress, controls, keys, masks, most, guesses, rows, cache_format
        )
        tokens, logprobs = tokens.at[:, number].set(new), logprobs.at[:, number].set(values)
        return number + 1, cache, progress, tokens, logprobs, jax.tree.map(jnp.add, verdict, judged)

    slots = progress.token.shape[0]
    tokens = jnp.full((slots, STEPS, count + 1), NOTHING, jnp.int32)
    zeros = jnp.zeros(slots, jnp.int32)
    start = jnp.int32(0), cache, progress, tokens, jnp.zeros(tokens.shape, jnp.float32), Verdict(zeros, zeros, zeros)
    _, cache, progress, tokens, logprobs, verdict = jax.lax.while_loop(goes_on, one_round, start)
    if rows is not None:
        progress = jax.tree.map(lambda old, new: old.at[jnp.asarray(rows)].set(new), whole, progress)
    return cache, progress, tokens, logprobs, verdict


def target_views(
    decoder: Decoder, cache: Cache, rows: jax.Array | np.ndarray | None, cache_format: CacheFormat
) -> dict[LayerKind, View]:
    """What a drafter looks at: the last layer of each kind that owns keys and values."""
    rows = None if rows is None else jnp.asarray(rows)
    cfg, views = decoder.cfg, {}
    for kind, index in producers(cfg).items():
        seen = cache.positions[kind] if rows is None else cache.positions[kind][rows]
        views[kind] = view_of(decoder.layers[index], cfg, cache_format, cache.layers[index], seen, rows)
    return views


def _guesses(
    decoder: Decoder,
    drafter: Drafter,
    cache: Cache,
    progress: Progress,
    controls: Controls,
    keys: jax.Array,
    rows: np.ndarray | None,
    count: int,
    cache_format: CacheFormat,
) -> jax.Array:
    """int32 [P, count]: what may come behind each slot's newest token."""
    if not count:
        return jnp.zeros((progress.token.shape[0], 0), jnp.int32)
    views = target_views(decoder, cache, rows, cache_format)
    position = jnp.where(progress.done, NOTHING, progress.position)

    def guess(carry, ahead):
        token, hidden = carry
        embedded = decoder.embed.lookup(token[:, None], hidden.dtype)[:, 0]
        state, hidden = drafter.step(embedded, hidden, position, views)
        logits, ids = drafter.scores(state)
        place, _ = choose(logits, controls.rules, _keys_at(keys, progress.position + 1 + ahead))
        token = place if ids is None else jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
        return (token, hidden), token

    assert progress.hidden is not None
    _, guesses = jax.lax.scan(guess, (progress.token, progress.hidden), jnp.arange(count, dtype=jnp.int32))
    return guesses.T


def _judged(
    decoder: Decoder,
    cache: Cache,
    progress: Progress,
    controls: Controls,
    keys: jax.Array,
    masks: Masks,
    most: jax.Array,
    guesses: jax.Array,
    rows: np.ndarray | None,
    cache_format: CacheFormat,
) -> tuple[Cache, Progress, jax.Array, jax.Array, Verdict]:
    """One forward pass: the tokens [P, count + 1] it gives each slot, -1 behind the last, and their log-probabilities."""
    inputs = jnp.concatenate([progress.token[:, None], guesses], axis=1)
    place = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    # Places that the answer cannot reach are not written: they would lie beyond the cache's end.
    used = ~progress.done[:, None] & (place <= most[:, None]) & (place < progress.left[:, None])
    positions = jnp.where(used, progress.position[:, None] + place, NOTHING)
    hidden, cache = decoder.step(inputs, positions, cache, cache_format, rows)
    tokens, logprobs = _chosen(decoder, hidden, progress.position[:, None] + 1 + place, controls, keys, masks)
    ends = (tokens[:, :, None] == controls.stop_ids[:, None]).any(axis=2) | (place + 1 >= progress.left[:, None])
    holds = (tokens[:, :-1] == guesses) & ~ends[:, :-1]
    reached = jnp.concatenate([jnp.ones_like(progress.done)[:, None], jnp.cumprod(holds, axis=1, dtype=bool)], axis=1)
    given = used & reached
    cache = forget(cache, jnp.where(used & ~given, positions, NOTHING), rows)
    count = given.sum(axis=1, dtype=jnp.int32)
    ended = (given & ends).any(axis=1)
    last = jnp.maximum(count - 1, 0)[:, None]
    new = Progress(
        jnp.where(progress.done, progress.token, jnp.take_along_axis(tokens, last, axis=1)[:, 0]),
        progress.position + count,
        progress.done | ended,
        progress.left - count,
        jnp.take_along_axis(hidden, last[:, :, None], axis=1)[:, 0],
    )
    weighed = given[:, :-1] & used[:, 1:]  # guesses that stood against a token of the answer
    right = tokens[:, :-1] == guesses
    verdict = Verdict(*(x.sum(axis=1, dtype=jnp.int32) for x in (used[:, 1:], weighed & right, weighed & ~right)))
    tokens, logprobs = jnp.where(given, tokens, NOTHING), jnp.where(given, logprobs, jnp.float32(0))
    return cache, new, tokens, logprobs, verdict


def _chosen(
    decoder: Decoder, hidden_BTD: jax.Array, positions_BT: jax.Array, controls: Controls, keys: jax.Array, masks: Masks
) -> tuple[jax.Array, jax.Array]:
    """The model's own token for each position [P, T], as `steps` chooses them one by one, and log-probabilities."""
    slots, length, _ = hidden_BTD.shape
    logits = decoder.logits(hidden_BTD)

    def per_place(x):
        return jnp.repeat(jnp.asarray(x), length, axis=0)

    rules = jax.tree.map(per_place, controls.rules)
    words = Masks(per_place(masks.words), masks.used)  # only single places have masks that allow less than everything
    noise = jax.vmap(_keys_at, (None, 1), 1)(keys, positions_BT).reshape(-1)
    token, logprob = choose(logits.reshape(slots * length, -1), rules, noise, words.apply)
    return token.reshape(slots, length), logprob.reshape(slots, length)


def _keys_at(keys_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The random keys of tokens at these positions, those of `steps.decode_steps`."""
    return jax.vmap(jax.random.fold_in)(keys_B, position_B)

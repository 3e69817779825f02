"""Prefill and decode of one batch, compiled once per (rows, prompt bucket, cache length) and never again.

Lengths, rules, seeds and stop ids are arrays, the model is an argument: another prompt, temperature or training step reuses
the same program. Decoding is a loop inside one program of up to CHUNK steps, with the cache updated in place; between chunks
Python sees the tokens and may end rows.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.infer.sampler import Rule, Rules, choose
from gemma4_jax.model.decode import Decoder, unroll
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.gathering import in_use
from gemma4_jax.model.kv import Cache
from gemma4_jax.model.linear import Weight, holding, multiplies_in
from gemma4_jax.model.transformer import Transformer

CHUNK = 32
SMALLEST_BUCKET = 16
NOTHING = -1  # in token arrays: no token; in positions: padding


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as ids and how to continue it; `stream` tells the requests of one seed apart."""

    tokens: Sequence[int]
    max_new_tokens: int
    rule: Rule
    seed: int = 0
    stream: int = 0
    stop_ids: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """What stays the same through a batch: rules and keys [B], stop ids int32 [B, n] (-1 unused)."""

    rules: Rules
    keys: jax.Array
    stop_ids: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where each row stands, [B]: its newest token and that token's position, whether it is done, tokens it may still get."""

    token: jax.Array
    position: jax.Array
    done: jax.Array
    left: jax.Array


@dataclasses.dataclass
class Batch:
    """A running batch. `Engine.decode` replaces cache and progress; the newest tokens are not yet in the cache."""

    controls: Controls
    cache: Cache
    progress: Progress


def bucket(length: int, most: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ... that holds `length`, at most `most`."""
    size = SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


class Engine:
    """A model ready to decode; `update` swaps its weights and keeps the compiled programs."""

    def __init__(self, model: Transformer):
        self.update(model)

    def update(self, model: Transformer | None) -> None:
        """Takes over the weights of a model, unrolled when they are first needed; None lets go of all weights."""
        self._model = model
        self._decoder: Decoder | None = None

    def prefill(
        self, requests: Sequence[Request], rows: int, cache_length: int
    ) -> tuple[Batch, np.ndarray, np.ndarray]:
        """The batch after its prompts; first tokens int32 [rows, 1] and log-probabilities, as `decode` gives them.

        `rows - len(requests)` rows are idle. The prompts and their answers must fit into `cache_length`.
        """
        if self._model is None:
            raise ValueError("The weights were released; call update with a model first.")
        if self._decoder is None:
            self._decoder = decoder_of(self._model)
        length = bucket(max(len(request.tokens) for request in requests), cache_length)
        tokens = np.zeros((rows, length), np.int32)
        positions = np.full((rows, length), NOTHING, np.int32)
        left = np.zeros(rows, np.int32)
        for row, request in enumerate(requests):
            size = len(request.tokens)
            tokens[row, :size] = request.tokens
            positions[row, :size] = np.arange(size)
            left[row] = request.max_new_tokens
        controls = controls_of(requests, rows)
        cache, logits = prefill_step(self._model, tokens, positions, cache_length=cache_length)
        progress, token, logprob = first_token(logits, controls, jnp.asarray(positions.max(axis=1)), jnp.asarray(left))
        return Batch(controls, cache, progress), np.asarray(token)[:, None], np.asarray(logprob)[:, None]

    def decode(self, batch: Batch, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Up to CHUNK more tokens of every row that is not done: int32 [rows, CHUNK] (-1: none) and log-probabilities.

        `ended` bool [rows] ends rows from outside, for a stop string or a cancelled request.
        """
        assert self._decoder is not None, "decode follows prefill"
        batch.cache, batch.progress, tokens, logprobs = decode_steps(
            self._decoder, batch.cache, batch.progress, batch.controls, ended
        )
        return np.asarray(tokens), np.asarray(logprobs)


def decoder_of(model: Transformer) -> Decoder:
    """The unrolled model with every weight as decoding uses it: rounded to its grid, in the compute dtype.

    A step reads all weights, so neither is left to the step. The router stays as it is: it computes in float32. Tables that
    need neither are the model's own arrays, not copies.
    """

    def ready(module):
        if not _is_weight(module) or multiplies_in(module.role, model.compute_dtype) is None:
            return module
        if module.grid is None and module.w.get_value().dtype == model.compute_dtype:
            return module
        return holding(module, _as_used(module, model.compute_dtype))

    return unroll(in_use(jax.tree.map(ready, model, is_leaf=_is_weight)))


def _is_weight(node: object) -> bool:
    return isinstance(node, Weight | Embedding)


@functools.partial(jax.jit, static_argnums=1)
def _as_used(module: Weight | Embedding, dtype: str) -> jax.Array:
    return module.head(dtype) if isinstance(module, Embedding) else module.rounded().astype(dtype)


@functools.partial(jax.jit, static_argnames="cache_length")
def prefill_step(
    model: Transformer, tokens_BT: np.ndarray, positions_BT: np.ndarray, *, cache_length: int
) -> tuple[Cache, jax.Array]:
    """The cache that prompts leave behind, and the logits [B, V] after the last token of each."""
    hidden, cache = model.prefill(jnp.asarray(tokens_BT), jnp.asarray(positions_BT), cache_length)
    last_B = jnp.argmax(positions_BT, axis=1)
    return cache, model.logits(jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0])


@jax.jit
def first_token(
    logits_BV: jax.Array, controls: Controls, position_B: jax.Array, left_B: jax.Array
) -> tuple[Progress, jax.Array, jax.Array]:
    """The first token of each row (-1 where left is 0), after the logits of the prompt's last token, at `position`.

    Apart from prefill, because it is compiled once for all prompt buckets.
    """
    return _extend(Progress(jnp.zeros_like(left_B), position_B, left_B == 0, left_B), logits_BV, controls)


@functools.partial(jax.jit, donate_argnames=("cache", "progress"))
def decode_steps(
    decoder: Decoder, cache: Cache, progress: Progress, controls: Controls, ended_B: np.ndarray
) -> tuple[Cache, Progress, jax.Array, jax.Array]:
    """CHUNK steps, or fewer when every row is done before; tokens [B, CHUNK] (-1: none) and log-probabilities."""
    rows = progress.token.shape[0]
    progress = dataclasses.replace(progress, done=progress.done | ended_B)

    def unfinished(carry):
        step, _, progress, _, _ = carry
        return (step < CHUNK) & ~progress.done.all()

    def one_step(carry):
        step, cache, progress, tokens, logprobs = carry
        positions = jnp.where(progress.done, NOTHING, progress.position)  # nothing is written for a row that is done
        hidden, cache = decoder.step(progress.token[:, None], positions[:, None], cache)
        progress, token, logprob = _extend(progress, decoder.logits(hidden[:, 0]), controls)
        return step + 1, cache, progress, tokens.at[:, step].set(token), logprobs.at[:, step].set(logprob)

    tokens = jnp.full((rows, CHUNK), NOTHING, jnp.int32)
    start = (jnp.int32(0), cache, progress, tokens, jnp.zeros((rows, CHUNK), jnp.float32))
    return jax.lax.while_loop(unfinished, one_step, start)[1:]


def _extend(progress: Progress, logits_BV: jax.Array, controls: Controls) -> tuple[Progress, jax.Array, jax.Array]:
    """One more token for every row that is not done; -1 and 0 for the others. The key depends on seed, stream and place."""
    position = progress.position + 1
    keys = jax.vmap(jax.random.fold_in)(controls.keys, position)
    token, logprob = choose(logits_BV, controls.rules, keys)
    left = jnp.where(progress.done, progress.left, progress.left - 1)
    ends = (token[:, None] == controls.stop_ids).any(axis=1) | (left <= 0)
    chosen = jnp.where(progress.done, NOTHING, token)
    new = Progress(token, position, progress.done | ends, left)
    return new, chosen, jnp.where(progress.done, jnp.float32(0), logprob)


def controls_of(requests: Sequence[Request], rows: int) -> Controls:
    """The requests' rules, keys and stop ids as arrays; idle rows repeat the first request."""
    filled = [*requests, *[requests[0]] * (rows - len(requests))]
    width = bucket(max(len(request.stop_ids) for request in filled), 1 << 30)
    stop_ids = np.full((rows, width), NOTHING, np.int32)
    for row, request in enumerate(filled):
        stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    seeds = np.asarray([request.seed for request in filled], np.uint32)
    streams = np.asarray([request.stream for request in filled], np.int32)
    return Controls(Rules.of([request.rule for request in filled]), _keys(seeds, streams), stop_ids)


@jax.jit
def _keys(seeds_B: np.ndarray, streams_B: np.ndarray) -> jax.Array:
    """One random key per row."""
    return jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(seeds_B, streams_B)

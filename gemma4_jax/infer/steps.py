"""The compiled programs of the engine: what reads a chunk of prompts, and what writes tokens into all slots.

Lengths, rules, seeds, stop ids, masks and the number of steps are arrays, the weights are arguments: another mix of requests
reuses the same programs. Caches and progress are donated and updated in place.

Reading a chunk takes four kinds of programs, called one after the other by `read_chunk`:

    begin    embeds the tokens, and notes their positions                                once per chunk
    fill     one block of layers that own keys and values                                 once per block
    finish   the last token of a prompt through the layers that share, and its answer     once per prompt
"""

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.infer.sampler import Rules, choose
from gemma4_jax.model.decode import Decoder, fill_block, last_through
from gemma4_jax.model.kv import Cache, Chunk, begin_rows, extend_rows, producers
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.multimodal import SoftTokens, merge, text_ids

STEPS = 32
"""Most steps of one call of `decode_steps`."""

NOTHING = -1  # in token arrays: no token; in positions: padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """How each slot draws, [B]: rules, seeds and streams; stop ids int32 [B, n] (-1 unused)."""

    rules: Rules
    seeds: np.ndarray | jax.Array
    streams: np.ndarray | jax.Array
    stop_ids: np.ndarray | jax.Array

    def keys(self) -> jax.Array:
        """One random key per slot."""
        return jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(self.seeds, self.streams)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where each slot stands, [B]: its newest token and that token's position, whether it is done, tokens it may still get.

    `hidden` [B, D]: the hidden state behind the final norm that gave the newest token, where a drafter goes on from it.
    """

    token: jax.Array
    position: jax.Array
    done: jax.Array
    left: jax.Array
    hidden: jax.Array | None = None

    @classmethod
    def idle(cls, slots: int, hidden: jax.Array | None = None) -> "Progress":
        """Nothing is written in any slot."""
        zeros = jnp.zeros(slots, jnp.int32)
        return cls(zeros, zeros + NOTHING, jnp.ones(slots, bool), zeros + 0, hidden)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Which tokens may come next: uint32 [B, ceil(V / 32)], bit v % 32 of word v // 32; bool scalar, whether any slot minds."""

    words: np.ndarray | jax.Array
    used: np.ndarray | jax.Array

    def apply(self, logits_BV: jax.Array) -> jax.Array:
        """The logits, -inf where a token may not come."""
        batch, vocab = logits_BV.shape

        def masked(logits):
            words = jnp.asarray(self.words)
            bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
            return jnp.where(bits.reshape(batch, -1)[:, :vocab] > 0, logits, -jnp.inf)

        return jax.lax.cond(self.used, masked, lambda logits: logits, logits_BV)


def read_chunk(
    decoder: Decoder, cache: Cache, chunk: Chunk, cache_format: CacheFormat, soft: SoftTokens | None = None
) -> tuple[Cache, jax.Array, dict[LayerKind, jax.Array]]:
    """The cache after a chunk, the residual stream [P, D] behind the own layers at each piece's last token, positions [P, S].

    `soft`: soft tokens in the chunk, if it has some. The programs of text are others, and know nothing of them.
    """
    cfg, period = decoder.cfg, decoder.cfg.layer_period
    start, before, after, positions = begin(
        decoder.embed, decoder.per_layer, cache.positions, chunk, cfg, str(decoder.compute_dtype), soft
    )
    h, per_layer = start
    ahead = None
    if soft is not None and cfg.sees_ahead:  # to layers it matters only who sees whom
        ahead = dataclasses.replace(soft, values=np.zeros((0, 0), np.float32))
    layers = []
    for block in range(len(cache.layers) // period):
        at = slice(block * period, (block + 1) * period)
        h, written = fill(
            tuple(decoder.layers[at]),
            cache.layers[at],
            h,
            per_layer,
            np.int32(block),
            before,
            chunk,
            cfg,
            cache_format,
            ahead,
        )
        layers += written
    return Cache(tuple(layers), positions), last_token(h, chunk.count), after


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=2)
def begin(
    embed, per_layer, positions: dict[LayerKind, jax.Array], chunk: Chunk, cfg: ModelConfig, dtype: str, soft=None
):
    """(residual stream, per-layer inputs [L, P, T, p] of the own layers), positions of the rows before and after, of all rows."""
    tokens = chunk.tokens if soft is None else text_ids(chunk.tokens, soft, cfg.pad_token_id)
    h = embed.lookup(tokens, dtype)
    h = h if soft is None else merge(h, soft)
    own = cfg.num_hidden_layers - cfg.num_kv_shared_layers
    inputs = None if per_layer is None else per_layer(tokens, h)[:own]
    before = begin_rows(positions, chunk)
    after = extend_rows(before, chunk)
    written = {kind: positions[kind].at[chunk.rows].set(after[kind], mode="drop") for kind in KINDS}
    return (h, inputs), before, after, written


@functools.partial(jax.jit, static_argnums=(7, 8), donate_argnums=(1, 2))
def fill(
    layers, stored, h, per_layer, block, before, chunk: Chunk, cfg: ModelConfig, cache_format: CacheFormat, soft=None
):
    """One block of layers; `block` says which of the per-layer inputs are its own."""
    if per_layer is not None:
        per_layer = jax.lax.dynamic_slice_in_dim(per_layer, block * len(layers), len(layers), 0)
    return fill_block(layers, stored, h, per_layer, before, chunk, cfg, cache_format, soft)


@jax.jit
def last_token(h_PTD: jax.Array, count_P: jax.Array) -> jax.Array:
    """What belongs to the last of each piece's tokens, [P, D]."""
    return jnp.take_along_axis(h_PTD, jnp.maximum(count_P - 1, 0)[:, None, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Pieces that end their prompts. tokens, rows, position, left int32 [P]: the last token and its place, tokens to write."""

    tokens: np.ndarray
    rows: np.ndarray
    position: np.ndarray
    left: np.ndarray


jax.tree_util.register_dataclass(Ends)


def finish_prompts(
    decoder: Decoder,
    cache: Cache,
    h_PD: jax.Array,
    after: dict[LayerKind, jax.Array],
    ends: Ends,
    progress: Progress,
    controls: Controls,
    masks: Masks,
    cache_format: CacheFormat,
) -> tuple[Progress, jax.Array, jax.Array]:
    """The first token of each answer and its log-probability [P]; rows beyond the last slot (prompts not yet whole) get none.

    `controls` and `masks` are those of the pieces, [P]; `h_PD` and `after` as `read_chunk` gives them.
    """
    cfg = decoder.cfg
    own = cfg.num_hidden_layers - cfg.num_kv_shared_layers
    shared = tuple(decoder.layers[own:])
    sources = {kind: cache.layers[index] for kind, index in producers(cfg).items()} if shared else {}
    tail = decoder.embed, decoder.per_layer if shared else None, decoder.final_norm
    return finish(tail, shared, sources, h_PD, after, ends, progress, controls, masks, cfg, cache_format)


@functools.partial(jax.jit, static_argnums=(9, 10), donate_argnums=6)
def finish(
    tail, shared, sources, h, after, ends: Ends, progress: Progress, controls: Controls, masks: Masks, cfg, cache_format
):
    embed, per_layer, norm = tail
    if shared:
        inputs = None
        if per_layer is not None:
            own = cfg.num_hidden_layers - cfg.num_kv_shared_layers
            tokens = jnp.asarray(ends.tokens)[:, None]
            inputs = per_layer(tokens, embed.lookup(tokens, h.dtype))[own:, :, 0]
        h = last_through(
            shared, sources, h, inputs, after, jnp.asarray(ends.position), jnp.asarray(ends.rows), cfg, cache_format
        )
    h = norm(h)
    logits = head(embed, cfg, h)
    position, left = jnp.asarray(ends.position), jnp.asarray(ends.left)
    hidden = None if progress.hidden is None else h
    pieces = Progress(jnp.zeros_like(position), position, left == 0, left, hidden)
    new, token, logprob = _extend(pieces, logits, controls, controls.keys(), masks)
    merged = jax.tree.map(lambda old, new: old.at[ends.rows].set(new, mode="drop"), progress, new)
    return merged, token, logprob


def head(embed, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 soft-capped logits of hidden states; `Transformer.logits` of a model in parts."""
    holder = _Head(embed, cfg)
    return Decoder.logits(holder, hidden)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class _Head:
    """As much of a model as its logits need."""

    embed: object
    cfg: ModelConfig


@functools.partial(jax.jit, static_argnames="cache_format", donate_argnames=("cache", "progress"))
def decode_steps(
    decoder: Decoder,
    cache: Cache,
    progress: Progress,
    controls: Controls,
    ended_B: np.ndarray,
    masks: Masks,
    steps: np.ndarray,
    eager: np.ndarray,
    rows: np.ndarray | None,
    *,
    cache_format: CacheFormat,
) -> tuple[Cache, Progress, jax.Array, jax.Array]:
    """Up to `steps` (at most STEPS) more tokens of every slot that is not done: [P, STEPS] (-1: none), and log-probabilities.

    Args:
      controls, ended_B, masks: of all slots; masks are those of the first step, and a call with masks takes one step.
      ended_B: slots that end now, from outside: a stop text, a cancelled request.
      steps: int32.
      eager: bool; return as soon as another slot is done, because somebody waits for it.
      rows: the slots [P] to work on; None: all, in order.
    """
    whole = dataclasses.replace(progress, done=progress.done | ended_B)
    progress = whole
    if rows is not None:
        at = jnp.asarray(rows)
        progress, controls, masks = of_rows(progress, at), of_rows(controls, at), of_rows(masks, at)
    keys, before = controls.keys(), progress.done

    def goes_on(carry):
        step, _, progress, _, _ = carry
        freed = eager & (progress.done & ~before).any()
        return (step < steps) & ~progress.done.all() & ~freed

    def one_step(carry):
        step, cache, progress, tokens, logprobs = carry
        positions = jnp.where(progress.done, NOTHING, progress.position)  # nothing is written for a slot that is done
        hidden, cache = decoder.step(progress.token[:, None], positions[:, None], cache, cache_format, rows)
        progress, token, logprob = _extend(progress, decoder.logits(hidden[:, 0]), controls, keys, masks)
        return step + 1, cache, progress, tokens.at[:, step].set(token), logprobs.at[:, step].set(logprob)

    tokens = jnp.full((progress.token.shape[0], STEPS), NOTHING, jnp.int32)
    start = (jnp.int32(0), cache, progress, tokens, jnp.zeros(tokens.shape, jnp.float32))
    _, cache, progress, tokens, logprobs = jax.lax.while_loop(goes_on, one_step, start)
    if rows is not None:
        progress = jax.tree.map(lambda old, new: old.at[jnp.asarray(rows)].set(new), whole, progress)
    return cache, progress, tokens, logprobs


R = TypeVar("R")


def of_rows(arrays: R, rows: jax.Array) -> R:
    """The same of some slots; scalars are everybody's."""
    return jax.tree.map(lambda x: jnp.asarray(x)[rows] if jnp.ndim(x) else x, arrays)


def _extend(
    progress: Progress, logits_BV: jax.Array, controls: Controls, keys: jax.Array, masks: Masks
) -> tuple[Progress, jax.Array, jax.Array]:
    """One more token for every row that is not done; -1 and 0 for the others. The key depends on seed, stream and place."""
    position = progress.position + 1
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    token, logprob = choose(logits_BV, controls.rules, keys, masks.apply)
    left = jnp.where(progress.done, progress.left, progress.left - 1)
    ends = (token[:, None] == controls.stop_ids).any(axis=1) | (left <= 0)
    chosen = jnp.where(progress.done, NOTHING, token)
    new = Progress(token, position, progress.done | ends, left, progress.hidden)
    return new, chosen, jnp.where(progress.done, jnp.float32(0), logprob)

"""Slots in which requests are answered side by side: they come and go, the batch goes on.

A request waits until a slot is free; its prompt is read in chunks into the slot's cache; then it writes tokens together with the
other slots, many steps in one program. Shapes are those of the slots, the chunks and the cache, never of a request: after
`warm_up` nothing compiles, whatever comes. What a request gets does not depend on its neighbours.

Not for several threads at once: whoever needs them puts a queue in front.
"""

import collections
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.infer import prefix
from gemma4_jax.infer.buckets import SMALLEST, bucket, chunk_sizes
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.drafting import Drafting
from gemma4_jax.infer.prefix import PrefixStore
from gemma4_jax.infer.request import Request, Running, masks_of
from gemma4_jax.infer.senses import WHOLE_PICTURE, Senses
from gemma4_jax.infer.slots import Slots
from gemma4_jax.infer.speculate import draft_steps
from gemma4_jax.infer.steps import (
    NOTHING,
    STEPS,
    Ends,
    Masks,
    Progress,
    decode_steps,
    finish_prompts,
    read_chunk,
)
from gemma4_jax.infer.weights import parts_of, placed
from gemma4_jax.model.decode import Decoder
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.kv import CACHE_DIMS, Cache, Chunk, empty_cache
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.multimodal import SoftTokens
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import constrain

CHUNK = 512
"""Most tokens of a prompt read at once. Attention of a chunk looks at chunk + window keys, so smaller ones do more work; larger
ones take more memory and keep the writing slots waiting longer."""

GROUP = 8
"""Most prompts read at once; the programs exist for one prompt and for this many."""

SOON = 4
"""Steps of a call while prompts wait to be read, or while somebody watches the text appear."""


class Engine:
    """A model ready to answer; `update` swaps its weights and keeps the compiled programs.

    Attributes:
        slots: requests that run side by side.
        max_length: most tokens of a prompt and its answer.
        prefixes: the beginnings that are kept.
        drafting: the drafter and how its guesses fared; None without one.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 8,
        max_length: int | None = None,
        cache: CacheConfig = CacheConfig(),  # noqa: B008
        chunk: int = CHUNK,
        consume: bool = False,
        packed: bool = False,
        drafter: Drafter | None = None,
        draft_tokens: int = 4,
    ):
        """`chunk` is a power of two from 16. `consume`: the model's own arrays are deleted as they are unrolled.

        `packed`: weights with a grid stay codes, see `weights.parts_of`. `drafter` guesses up to `draft_tokens` tokens for each
        forward pass, see `speculate`: other speed, the same answers.

        Raises UserError for a cache layout that the model cannot have, and for a drafter of another model.
        """
        if chunk not in chunk_sizes(max(chunk, SMALLEST)):
            raise ValueError(f"chunk is a power of two from {SMALLEST}, got {chunk}.")
        self.cfg = model.cfg
        self.slots = slots
        self.max_length = max_length or model.cfg.max_position_embeddings
        self.format = cache.format(model.cfg)
        self.prefixes = PrefixStore(model.cfg, cache.prefix_mb * 10**6)
        self.drafting = None if drafter is None else Drafting.of(drafter, model.cfg, draft_tokens)
        self._sizes = chunk_sizes(min(chunk, 1 << (self.max_length - 1).bit_length()))
        self._chunk, self._group = self._sizes[-1], min(GROUP, slots)
        if self.cfg.vision is not None and self.cfg.sees_ahead and self._chunk < min(WHOLE_PICTURE, self.max_length):
            self._sizes.append(WHOLE_PICTURE)
        self._senses = Senses(self.cfg, self._group, self._sizes[-1])
        self._packed = packed
        self._cache: Cache | None = None
        self._waiting: collections.deque[Running] = collections.deque()
        self._reset()
        self.update(model, consume=consume)

    def update(self, model: Transformer | None, *, consume: bool = False) -> None:
        """Takes over the weights of a model, unrolled when they are first needed; None lets go of all weights and caches.

        Requests that are running end with the reason "cancelled".
        """
        for running in [*self._waiting, *self._at.running]:
            if running is not None:
                self.cancel(running)
        self._model, self._consume = model, consume
        self._decoder: Decoder | None = None
        self._senses.use(None)
        self.prefixes.clear()
        if self.drafting is not None:
            self.drafting.rest()
        if model is None:
            self._cache, self._progress = None, None
        elif consume:
            self._ready()

    def submit(self, request: Request) -> Running:
        """Queues a request. Raises UserError, one sentence, if it can never be answered; the others go on."""
        self.check(request)
        running = Running(request)
        self._waiting.append(running)
        return running

    def check(self, request: Request) -> None:
        """UserError if a request can never be answered."""
        request.check(self.cfg.vocab_size, self.max_length)
        self._senses.check(request)

    def cancel(self, running: Running) -> None:
        """Ends a request; its slot is free for the next one at once."""
        if running.done:
            return
        running.end("cancelled")
        if running.slot is not None:
            self._at.leave(running.slot)
        else:
            self._waiting.remove(running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and all(running is None for running in self._at.running)

    def step(self, *, soon: bool = False) -> bool:
        """Does the next piece of work: prompts into free slots, a chunk of prompts read, some tokens written. False if idle.

        `soon`: few tokens at a time, for who watches them appear.
        """
        self._admit()
        reading = [running for running in self._at.running if running is not None and running.reading]
        long = False
        if reading:
            long = self._read(reading)
        writing = any(running is not None and not running.reading for running in self._at.running)
        still_reading = any(running is not None and running.reading for running in self._at.running)
        # Short prompts fill the free slots before anybody writes; long ones take turns with the writing.
        if writing and (long or not still_reading):
            self._write(SOON if soon or still_reading else STEPS)
        return not self.idle

    def reserve(self, length: int) -> None:
        """Makes room for requests of `length` tokens, prompt and answer, so that the cache need not grow under them."""
        length = min(length, self.max_length)
        if self._cache is None or length > self._length:
            self._grow(bucket(length, self.max_length))

    def warm_up(self) -> None:
        """Compiles every program for requests up to `max_length`. The engine must be idle."""
        if not self.idle:
            raise ValueError("warm_up wants an idle engine.")
        decoder = self._ready()
        self.reserve(self.max_length)
        self._senses.warm_up()
        for pieces in sorted({1, self._group}):
            rows = np.full(pieces, self.slots, np.int32)
            for size in self._sizes:
                zeros = np.zeros(pieces, np.int32)
                chunk = Chunk(np.zeros((pieces, size), np.int32), rows, zeros, zeros, np.zeros(pieces, bool))
                if self.cfg.is_multimodal:
                    self._read_chunk(chunk, self._senses.blank((pieces, size)))
                h, after = self._read_chunk(chunk)
            self._finish(decoder, h, after, Ends(rows * 0, rows, rows * 0 - 1, rows * 0))
        for alone in (False, True)[: self.slots]:
            for count in (None,) if self.drafting is None else self.drafting.lengths:
                self._write(1, alone=alone, count=count)
        if self.prefixes.budget:
            count = 1
            while True:
                size = prefix.rounded(count, self._length)
                layers, ring = prefix.take(self._cache, np.int32(0), self.cfg, size)
                self._cache = prefix.put(self._cache, layers, ring, np.int32(0), np.int32(0), self.cfg)
                if size == self._length:
                    break
                count = size + 1

    def _reset(self) -> None:
        self._at = Slots.empty(self.slots)
        self._progress: Progress | None = None
        self._all_allowed = jnp.full((self.slots, -(-self.cfg.vocab_size // 32)), 0xFFFFFFFF, jnp.uint32)

    def _ready(self) -> Decoder:
        if self._decoder is None:
            if self._model is None:
                raise ValueError("The weights were released; call update with a model first.")
            self._decoder, towers = parts_of(self._model, consume=self._consume, packed=self._packed)
            self._senses.use(towers)
            if self.drafting is not None:
                self.drafting.use(self._decoder)
            if self._consume:
                self._model = None
        return self._decoder

    @property
    def _length(self) -> int:
        return 0 if self._cache is None else self._cache.positions["full"].shape[1]

    def _grow(self, length: int) -> None:
        """A longer cache. A slot's tokens keep their places: of full layers slot s holds position s, and rings only grow as
        long as they have not wrapped."""
        decoder = self._ready()
        ahead = 1 if self.drafting is None else self.drafting.ahead
        fresh = placed(_empty(self.cfg, self.slots, length, str(decoder.compute_dtype), self.format, ahead))
        if self._cache is not None and not self.idle:
            fresh = _copied(self._cache, fresh)
        self._cache = fresh
        if self._progress is None:
            hidden = None
            if self.drafting is not None:
                hidden = jnp.zeros((self.slots, self.cfg.hidden_size), decoder.compute_dtype)
            self._progress, self._all_allowed = placed((Progress.idle(self.slots, hidden), self._all_allowed))

    def _admit(self) -> None:
        """Waiting requests go to free slots."""
        for slot, occupied in enumerate(self._at.running):
            if occupied is not None or not self._waiting:
                continue
            running = self._waiting.popleft()
            request = running.request
            self.reserve(len(request.tokens) + request.max_new_tokens)
            self._at.enter(slot, running)
            self._at.ended[slot] = True
            if self.prefixes.budget:
                self._reuse(slot, running)

    def _reuse(self, slot: int, running: Running) -> None:
        tokens = running.request.keys
        found = self.prefixes.longest(tokens)
        if found is not None:
            count = found.tokens.size
            self._cache = prefix.put(self._cache, found.layers, found.ring, np.int32(count), np.int32(slot), self.cfg)
            running.read = running.reused = count
        running.cuts = self.prefixes.cut(tokens, running.read)

    def _read(self, reading: list[Running]) -> bool:
        """One chunk of some prompts; says whether any of them is long."""
        decoder = self._ready()
        chosen = reading[: self._group]
        sizes = [self._next_piece(running) for running in chosen]
        pieces = 1 if len(chosen) == 1 else self._group
        width = next(size for size in self._sizes if size >= max(sizes))
        arrays = [np.full(pieces, fill, np.int32) for fill in (self.slots, 0, 0)]
        rows, first, count = arrays
        tokens, fresh = np.zeros((pieces, width), np.int32), np.zeros(pieces, bool)
        last, left, ends = np.zeros(pieces, np.int32), np.zeros(pieces, np.int32), np.full(pieces, self.slots, np.int32)
        for i, (running, size) in enumerate(zip(chosen, sizes, strict=True)):
            request = running.request
            assert running.slot is not None
            rows[i], first[i], count[i], fresh[i] = running.slot, running.read, size, running.read == 0
            tokens[i, :size] = request.tokens[running.read : running.read + size]
            last[i] = tokens[i, size - 1]
            running.read += size
            if not running.reading:
                ends[i], left[i] = running.slot, request.max_new_tokens
        looked = [(running, running.read - size, size) for running, size in zip(chosen, sizes, strict=True)]
        soft = self._senses.of_chunk(looked, (pieces, width))
        h, after = self._read_chunk(Chunk(tokens, rows, first, count, fresh), soft)
        for running in chosen:
            if running.read in running.cuts:
                assert self._cache is not None
                assert running.slot is not None
                self.prefixes.keep(self._cache, running.slot, running.request.keys[: running.read])
        if (ends < self.slots).any():
            position = np.where(ends < self.slots, first + count - 1, NOTHING).astype(np.int32)
            self._first_tokens(decoder, chosen, h, after, Ends(last, ends, position, left))
        return max(sizes) >= self._chunk

    def _next_piece(self, running: Running) -> int:
        """How many tokens of this prompt to read next."""
        left = min(len(running.request.tokens) - running.read, self._chunk)
        size = min([left, *(cut - running.read for cut in running.cuts if cut > running.read)])
        return self._senses.whole(running.request, running.read, size)

    def _read_chunk(self, chunk: Chunk, soft: SoftTokens | None = None):
        assert self._cache is not None
        self._cache, h, after = read_chunk(self._ready(), self._cache, chunk, self.format, soft)
        return h, after

    def _first_tokens(self, decoder: Decoder, chosen: list[Running], h, after, ends: Ends) -> None:
        tokens, logprobs = self._finish(decoder, h, after, ends, chosen)
        for i, running in enumerate(chosen):
            if ends.rows[i] < self.slots:
                self._at.ended[running.slot] = False
                self._take(running, tokens[i : i + 1], logprobs[i : i + 1])

    def _finish(self, decoder: Decoder, h, after, ends: Ends, chosen: Sequence[Running] = ()):
        pieces = len(ends.rows)
        ending = [running if row < self.slots else None for running, row in zip(chosen, ends.rows, strict=False)]
        masks = Masks(masks_of([*ending, *[None] * (pieces - len(ending))], self.cfg.vocab_size), _minds(ending))
        assert self._cache is not None
        assert self._progress is not None
        self._progress, token, logprob = finish_prompts(
            decoder, self._cache, h, after, ends, self._progress, self._at.of(ends.rows), masks, self.format
        )
        return np.asarray(token), np.asarray(logprob)

    def _write(self, steps: int, *, alone: bool | None = None, count: int | None = None) -> None:
        """Some tokens in all slots that write. One slot alone has a program of its own: idle slots cost as much as busy ones.

        `count`: guesses of a round, where there is a drafter; None: as many as are worth it.
        """
        running = self._at.running
        writing = [slot for slot, one in enumerate(running) if one is not None and not one.reading]
        alone = len(writing) == 1 if alone is None else alone
        rows = np.asarray(writing[:1] or [0], np.int32) if alone and self.slots > 1 else None
        minds = _minds([running[slot] for slot in writing])
        words = self._all_allowed
        if minds:
            words = jax.device_put(masks_of(running, self.cfg.vocab_size), words.sharding)
        tokens, logprobs = self._call(1 if minds else steps, Masks(words, minds), rows, count)
        for slot in writing:
            one, place = running[slot], slot if rows is None else 0
            assert one is not None
            self._take(one, tokens[place], logprobs[place])

    def _call(self, steps: int, masks: Masks, rows: np.ndarray | None, count: int | None):
        """The program that writes: tokens and log-probabilities [P, n] in order, -1 where there is none."""
        ended, eager, drafting = self._at.ended.copy(), np.bool_(bool(self._waiting)), self.drafting
        before = self._ready(), self._cache, self._progress, self._at.controls, ended, masks
        if drafting is None:
            self._cache, self._progress, tokens, logprobs = decode_steps(
                *before, np.int32(steps), eager, rows, cache_format=self.format
            )
            return np.asarray(tokens), np.asarray(logprobs)
        count = drafting.length() if count is None else count
        # A constraint knows what may come next only once it has seen the token before.
        most = np.asarray([0 if _minds([one]) else count for one in self._at.running], np.int32)
        rounds = np.int32(drafting.rounds_of(steps, count))
        decoder, *rest = before
        self._cache, self._progress, tokens, logprobs, verdict = draft_steps(
            decoder, drafting.ready, *rest, most, rounds, eager, rows, count=count, cache_format=self.format
        )
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        drafting.learn(tokens, verdict)
        return tokens.reshape(len(tokens), -1), logprobs.reshape(len(tokens), -1)

    def _take(self, running: Running, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """The newest tokens of a slot; frees it if they end the answer."""
        real = tokens >= 0
        new, logprobs = tokens[real].tolist(), logprobs[real].tolist()
        for place, (token, logprob) in enumerate(zip(new, logprobs, strict=True)):
            running.take(token, logprob)
            if running.done:
                slot = running.slot
                assert slot is not None
                self._at.leave(slot)
                if self.prefixes.budget and place == len(new) - 1:
                    assert self._cache is not None
                    # The newest token is not in the cache yet.
                    written = [*running.request.keys, *running.tokens[:-1]]
                    self.prefixes.keep(self._cache, slot, written)
                    self.prefixes.saw(written)
                return


def _minds(running: Sequence[Running | None]) -> np.ndarray:
    return np.asarray(any(one is not None and one.request.constraint is not None for one in running))


@jax.jit
def _copied(old: Cache, new: Cache) -> Cache:
    """The new, longer cache with the contents of the old one."""
    return jax.tree.map(lambda o, n: jax.lax.dynamic_update_slice(n, o, (0,) * n.ndim), old, new)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _empty(cfg: ModelConfig, slots: int, length: int, dtype: str, cache_format: CacheFormat, ahead: int) -> Cache:
    cache = empty_cache(cfg, slots, length, dtype, ahead, cache_format)
    layers = jax.tree.map(lambda x: constrain(x, *CACHE_DIMS[: x.ndim]), cache.layers)
    return Cache(layers, {kind: constrain(where, "batch", "slots") for kind, where in cache.positions.items()})

"""Beginnings of earlier requests, so that a system prompt or the turns before are read once.

A ring forgets, so the cache of a prefix can be taken only while the newest token in it is the prefix's last: at the end of a
chunk and at the end of an answer. Where two prompts begin alike, the second one's chunks are cut at the place where they part,
and what is stored there serves the third.
"""

import dataclasses
import functools
from collections import OrderedDict, deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.kernels.cached import Codes
from gemma4_jax.kernels.slices import moved
from gemma4_jax.model.kv import Cache, owner_kinds

SHORTEST = 32
"""Tokens of a beginning that is worth keeping."""

RECENT = 32
"""Prompts that a new one is compared with."""

Stored = dict[str, Codes]
Keys = Sequence[int] | np.ndarray
"""Tokens, where they say it all; else `Request.keys`."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The cache of one beginning: whole rings of sliding layers, the used slots (rounded up) of full layers; [K, S, W] each."""

    tokens: np.ndarray
    layers: tuple[Stored, ...]
    ring: jax.Array

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))


class PrefixStore:
    """Snapshots up to a number of bytes; the one not used for the longest time goes first."""

    def __init__(self, cfg: ModelConfig, budget: int):
        self.budget = budget
        self._cfg = cfg
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._recent: deque[np.ndarray] = deque(maxlen=RECENT)
        self._bytes = 0

    @property
    def used(self) -> int:
        """Bytes of all snapshots."""
        return self._bytes

    def clear(self) -> None:
        """Forgets everything: other weights give other keys and values."""
        self._kept.clear()
        self._recent.clear()
        self._bytes = 0

    def longest(self, tokens: Keys) -> Snapshot | None:
        """The longest beginning of these tokens that is kept; never all of them, for the last one has to be read."""
        prompt = np.asarray(tokens, np.int32)
        fitting = [
            (key, one)
            for key, one in self._kept.items()
            if one.tokens.size < prompt.size and np.array_equal(prompt[: one.tokens.size], one.tokens)
        ]
        if not fitting:
            return None
        key, best = max(fitting, key=lambda pair: pair[1].tokens.size)
        self._kept.move_to_end(key)
        return best

    def cut(self, tokens: Keys, known: int) -> list[int]:
        """Where to take snapshots while these tokens are read: where they part from recent ones, beyond the `known` first."""
        prompt = np.asarray(tokens, np.int32)
        places = {_common(prompt, other) for other in self._recent}
        places = {min(place, prompt.size - 1) for place in places}
        self.saw(prompt)
        return sorted(place for place in places if place >= max(SHORTEST, known + 1))[-1:]

    def saw(self, tokens: Keys) -> None:
        """Later prompts may begin like these."""
        self._recent.append(np.asarray(tokens, np.int32))

    def keep(self, cache: Cache, slot: int, tokens: Keys) -> bool:
        """Takes the cache of a slot whose newest token is the last of `tokens`; False if it would take over half the budget."""
        prefix = np.asarray(tokens, np.int32)
        key = prefix.tobytes()
        if key in self._kept or prefix.size < SHORTEST:
            return False
        length = next((where.shape[1] for kind, where in cache.positions.items() if kind == "full"))
        size = rounded(prefix.size, length)
        if 2 * _size(self._cfg, cache, size) > self.budget:
            return False
        layers, ring = take(cache, np.int32(slot), self._cfg, size)
        found = Snapshot(prefix, layers, ring)
        self._kept[key] = found
        self._bytes += found.bytes
        while self._bytes > self.budget:
            self._bytes -= self._kept.popitem(last=False)[1].bytes
        return True


def rounded(count: int, most: int) -> int:
    """Slots of full layers that a snapshot of so many tokens holds: a power of two, so that few programs serve all."""
    return min(most, 1 << max(6, (count - 1).bit_length()))


@functools.partial(jax.jit, static_argnums=(2, 3))
def take(cache: Cache, slot: np.ndarray, cfg: ModelConfig, size: int) -> tuple[tuple[Stored, ...], jax.Array]:
    """What a slot stores: all of sliding layers' rings, the first `size` slots of full layers; positions in the ring."""

    def one(x: jax.Array, kind: str) -> jax.Array:
        def of_slot(x: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_index_in_dim(x, slot, 0, keepdims=False)
            return part if kind == "sliding" else jax.lax.slice_in_dim(part, 0, size, axis=1)

        return moved(of_slot, x)

    kinds = owner_kinds(cfg)
    layers = (jax.tree.map(lambda x, k=kind: one(x, k), parts) for kind, parts in zip(kinds, cache.layers, strict=True))
    return tuple(layers), cache.positions["sliding"][slot]


@functools.partial(jax.jit, static_argnums=(5,), donate_argnums=0)
def put(
    cache: Cache, layers: tuple[Stored, ...], ring: jax.Array, count: np.ndarray, slot: np.ndarray, cfg: ModelConfig
) -> Cache:
    """The cache with a snapshot of `count` tokens in a slot."""

    def one(whole: jax.Array, part: jax.Array) -> jax.Array:
        begin = (slot, *(np.int32(0),) * part.ndim)
        return moved(lambda whole, part: jax.lax.dynamic_update_slice(whole, part[None], begin), whole, part)

    written = jax.tree.map(one, cache.layers, layers)
    full = cache.positions["full"]
    index = jnp.arange(full.shape[1], dtype=jnp.int32)
    rows: dict[LayerKind, jax.Array] = {"sliding": ring, "full": jnp.where(index < count, index, -1)}
    return Cache(written, {kind: cache.positions[kind].at[slot].set(rows[kind]) for kind in KINDS})


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(a.size, b.size)
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


def _size(cfg: ModelConfig, cache: Cache, size: int) -> int:
    total = 0
    for kind, parts in zip(owner_kinds(cfg), cache.layers, strict=True):
        for x in jax.tree.leaves(parts):
            total += x.nbytes // x.shape[0] if kind == "sliding" else x.nbytes // x.shape[0] // x.shape[2] * size
    return total

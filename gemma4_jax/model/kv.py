"""Keys and values with the positions they belong to, and the cache that decoding writes.

A slot holds the token whose position is slot modulo size; masks come from positions, so a ring of `sliding_window`
slots needs no mode flag and a cache as long as the context is a ring that never wraps. What a slot holds of a token is
`layouts.py`'s matter.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.kernels.cached import Codes
from gemma4_jax.kernels.slices import moved
from gemma4_jax.model.layouts import CacheFormat, blank, widths
from gemma4_jax.sharding import activation_spec, axes_in, current_mesh

CACHE_DIMS = ("batch", "kv_heads", "slots", None)
"""Dims of what is stored; a scale has the first three."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """What the queries of a sequence look at: k, v [B, S, K, H]; positions int32 [B, S], -1 where empty; segment ids or None.

    Key s + `before` and query s are the same token, which lets sliding attention skip what lies outside the window.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None = None
    before: int = dataclasses.field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What is stored of every layer that owns keys and values ([B, K, slots, W] each), and the positions in each kind's slots."""

    layers: tuple[dict[str, Codes], ...]
    positions: dict[LayerKind, jax.Array]


class Chunk(NamedTuple):
    """A piece of some rows' prompts, P pieces of up to T tokens.

    tokens int32 [P, T]; rows int32 [P], where they go (beyond the last row: nowhere); first int32 [P], position of the first
    token; count int32 [P], how many are tokens; fresh bool [P], whether what the row held before is forgotten.
    """

    tokens: Any
    rows: Any
    first: Any
    count: Any
    fresh: Any

    @property
    def positions(self) -> jax.Array:
        """int32 [P, T], -1 for padding."""
        step = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return jnp.where(step < self.count[:, None], self.first[:, None] + step, -1)


def owner_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of the layers that own keys and values, in order."""
    return cfg.layer_kinds[: cfg.num_hidden_layers - cfg.num_kv_shared_layers]


def producers(cfg: ModelConfig) -> dict[LayerKind, int]:
    """For each kind the last layer that owns keys and values: the one that sharing layers read."""
    return {kind: index for index, kind in enumerate(owner_kinds(cfg))}


def slots(cfg: ModelConfig, kind: LayerKind, max_length: int, ahead: int = 1) -> int:
    """Slots a layer of this kind needs for `max_length` tokens when at most `ahead` are written at once."""
    window = cfg.window(kind)
    return max_length if window is None else min(max_length, window + ahead - 1)


def empty_cache(
    cfg: ModelConfig,
    batch: int,
    max_length: int,
    dtype: jax.typing.DTypeLike,
    ahead: int = 1,
    cache_format: CacheFormat = CacheFormat(),  # noqa: B008
) -> Cache:
    """A cache without tokens."""
    size = {kind: slots(cfg, kind, max_length, ahead) for kind in KINDS}
    layers = (blank(cfg, kind, cache_format, batch, size[kind], dtype) for kind in owner_kinds(cfg))
    return Cache(tuple(layers), {kind: jnp.full((batch, size[kind]), -1, jnp.int32) for kind in KINDS})


def slot_bytes(cfg: ModelConfig, kind: LayerKind, itemsize: int, cache_format: CacheFormat = CacheFormat()) -> int:  # noqa: B008
    """Bytes that one layer of this kind stores of a token."""
    eight = cache_format.storage != "compute"
    numbers = widths(cfg, kind, cache_format).values()
    return cfg.kv_heads(kind) * sum(width * (1 if eight else itemsize) + 4 * eight for width in numbers)


def slot_of(positions_BT: jax.Array, size: int) -> jax.Array:
    """The slot each new token is written to; `size` (out of range) for padding and for what this write overtakes."""
    last = jnp.max(positions_BT, axis=1, keepdims=True)
    keep = (positions_BT >= 0) & (positions_BT > last - size)
    return jnp.where(keep, positions_BT % size, size)


def write_positions(
    slots_BS: jax.Array, slot_BT: jax.Array, positions_BT: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """The positions of slots with new ones where `slot_of` says, of all rows or of the named ones."""
    return _put(slots_BS, rows, slot_BT, positions_BT, ("batch", "slots"))


def write(
    parts: dict[str, Codes], slot_BT: jax.Array, new: dict[str, Codes], rows: jax.Array | None = None
) -> dict[str, Codes]:
    """A layer's parts with new tokens [B, T, K, W] put where `slot_of` says; out-of-range slots (and rows) are dropped.

    On a mesh every device writes what falls into its own slots; the cache does not move.
    """

    def put(old: Any, new: Any) -> Any:
        return None if old is None or new is None else _put(old, rows, slot_BT, new, CACHE_DIMS[: old.ndim])

    return {name: Codes(*map(put, parts[name], new[name])) for name in parts}


def forget(cache: Cache, positions_BT: jax.Array, rows: jax.Array | np.ndarray | None = None) -> Cache:
    """The cache without tokens [B, T] that were the newest (their positions; -1: none): their slots are empty again.

    What stood in these slots before is lost, so a cache whose tokens may be taken back is made with an `ahead` that has room for
    them: then it was out of every window.
    """
    rows = None if rows is None else jnp.asarray(rows)
    nothing = jnp.full_like(positions_BT, -1)
    positions: dict[LayerKind, jax.Array] = {
        kind: write_positions(where, slot_of(positions_BT, where.shape[1]), nothing, rows)
        for kind, where in cache.positions.items()
    }
    return Cache(cache.layers, positions)


def _put(old: jax.Array, rows: jax.Array | None, slot_BT: jax.Array, new: jax.Array, dims: tuple) -> jax.Array:
    """old [B, (K,) S, ...] with new [B or P, T, (K,) ...] in the slots; one write per token, of all its heads."""
    mesh = current_mesh()
    new = new.astype(old.dtype)
    if mesh is None:
        return moved(lambda old, new: _put_here(old, rows, slot_BT, new), old, new)
    spec = activation_spec(mesh, dims, old.shape)
    slots_at = dims.index("slots")
    batch = spec[0] if rows is None else None
    of_new = PartitionSpec(batch, None, *(spec[1:slots_at]), *spec[slots_at + 1 :])

    def island(old, slot, new, *rows):
        slot = _local(slot, old.shape[slots_at], axes_in(spec[slots_at]))
        row = _local(rows[0], old.shape[0], axes_in(spec[0])) if rows else None
        return moved(lambda old, new: _put_here(old, row, slot, new), old, new)

    operands = (old, slot_BT, new) if rows is None else (old, slot_BT, new, rows)
    specs = (spec, PartitionSpec(batch, None), of_new, PartitionSpec(None))[: len(operands)]
    mapped = jax.shard_map(island, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(*operands)


def _local(index: jax.Array, size: int, axes: tuple[str, ...]) -> jax.Array:
    """An index into a dim that is cut over axes as one into this device's part; out of range where it is not here."""
    if not axes:
        return index
    local = index - jax.lax.axis_index(axes) * size
    return jnp.where((local >= 0) & (local < size), local, size)  # a negative index would count from the end


FEW, FEW_ON_CPU = 16, 64
"""Tokens, of all rows, that are written one by one."""


def _put_here(old: jax.Array, rows: jax.Array | None, slot_BT: jax.Array, new: jax.Array) -> jax.Array:
    """As `_put` on one device. Few tokens: slices written in place, where one is out of range with what was there.

    XLA makes of a scatter on CPU a loop with copies of what it writes to.
    """
    count, length = slot_BT.shape
    rows = jnp.arange(count, dtype=jnp.int32) if rows is None else rows
    slots_at = 1 if old.ndim == 2 else 2
    few = FEW_ON_CPU if jax.default_backend() == "cpu" else FEW
    if count * length > few:
        row = jnp.broadcast_to(rows[:, None], slot_BT.shape)
        at = (row, slot_BT) if old.ndim == 2 else (row, slice(None), slot_BT)
        return old.at[at].set(new, mode="drop")
    shape = (1, *old.shape[1:slots_at], 1, *old.shape[slots_at + 1 :])

    def one(i: int | jax.Array, old: jax.Array) -> jax.Array:
        b, t = i // length, i % length
        row, slot = rows[b], slot_BT[b, t]
        begin = [jnp.int32(0)] * old.ndim
        begin[0], begin[slots_at] = row, slot
        inside = (row < old.shape[0]) & (slot < old.shape[slots_at])
        after = jnp.where(inside, new[b, t].reshape(shape), jax.lax.dynamic_slice(old, begin, shape))
        return jax.lax.dynamic_update_slice(old, after, begin)

    tokens = count * length
    return one(0, old) if tokens == 1 else jax.lax.fori_loop(0, tokens, one, old)


def write_rows(parts: dict[str, Codes], chunk: Chunk, new: dict[str, Codes], *, ordered: bool) -> dict[str, Codes]:
    """A layer's parts with a chunk's tokens [P, T, K, W] in the chunk's rows, as whole blocks of slots.

    As `write`, which goes token by token (on CPU: 8 us each and array, a tenth of a prefill). Slot s gets the newest position
    p <= last with p % size == s, if that is one of the chunk's. `ordered`: slots are positions, so only T slots change.
    """
    if current_mesh() is not None:
        any_part = next(iter(parts.values())).values
        return write(parts, slot_of(chunk.positions, any_part.shape[2]), new, chunk.rows)
    length = chunk.tokens.shape[1]

    def put(old: Any, new: Any) -> Any:
        if old is None or new is None:
            return None
        size = old.shape[2]
        touched = min(length, size) if ordered else size
        trail = (1,) * (old.ndim - 3)

        def one(p, whole, new):
            row = jnp.minimum(chunk.rows[p], old.shape[0] - 1)
            start = jnp.minimum(chunk.first[p], size - touched) if ordered else jnp.zeros_like(row)
            count = jnp.where(chunk.rows[p] < old.shape[0], chunk.count[p], 0)
            token, mine = _token_of(start + jnp.arange(touched, dtype=jnp.int32), chunk.first[p], count, size)
            begin = (row, jnp.zeros_like(row), start, *(jnp.zeros_like(row),) * len(trail))
            before = jax.lax.dynamic_slice(whole, begin, (1, whole.shape[1], touched, *whole.shape[3:]))
            fresh = jnp.take(new[p], jnp.clip(token, 0, length - 1), axis=1)[None]
            after = jnp.where(mine.reshape(1, 1, touched, *trail), fresh, before)
            return jax.lax.dynamic_update_slice(whole, after, begin)

        def every(whole, new):
            count = chunk.rows.shape[0]
            if count == 1:
                return one(0, whole, new)
            return jax.lax.fori_loop(0, count, lambda p, whole: one(p, whole, new), whole)

        return moved(every, old, jnp.moveaxis(new.astype(old.dtype), 1, 2))

    return {name: Codes(*map(put, parts[name], new[name])) for name in parts}


def _token_of(slot: jax.Array, first: jax.Array, count: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Which of the tokens first, first + 1, ... each slot gets, and whether it gets one."""
    last = first + count - 1
    token = last - (last - slot) % size - first
    return token, (token >= 0) & (token < count)


def begin_rows(positions: dict[LayerKind, jax.Array], chunk: Chunk) -> dict[LayerKind, jax.Array]:
    """The positions in the slots of the chunk's rows before it is written, [P, S] by kind: emptied where `fresh`."""

    def rows(where: jax.Array) -> jax.Array:
        mine = where[jnp.minimum(chunk.rows, where.shape[0] - 1)]
        return jnp.where(chunk.fresh[:, None], -1, mine)

    return {kind: rows(where) for kind, where in positions.items()}


def extend_rows(before: dict[LayerKind, jax.Array], chunk: Chunk) -> dict[LayerKind, jax.Array]:
    """The same after it is written."""

    def rows(where: jax.Array) -> jax.Array:
        size = where.shape[1]
        slot = jnp.arange(size, dtype=jnp.int32)[None]
        token, mine = _token_of(slot, chunk.first[:, None], chunk.count[:, None], size)
        return jnp.where(mine, token + chunk.first[:, None], where)

    return {kind: rows(where) for kind, where in before.items()}


def halo(
    parts: dict[str, Codes], positions_PS: jax.Array, chunk: Chunk, window: int
) -> tuple[dict[str, Codes], jax.Array]:
    """The last tokens before the chunk, at most `window`, in order: their parts [P, n, K, W] and positions [P, n] (-1: none).

    `positions` are those of `begin_rows`.
    """
    any_part = next(iter(parts.values())).values
    size = any_part.shape[2]
    count = min(size, window)
    wanted = chunk.first[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]
    slot = wanted % size
    found = jnp.take_along_axis(positions_PS, slot, axis=1) == wanted
    rows = jnp.minimum(chunk.rows, any_part.shape[0] - 1)

    def take(x: Any) -> Any:
        if x is None:
            return None

        def of_rows(x):
            def one(row, slot):
                return jnp.take(jax.lax.dynamic_index_in_dim(x, row, 0, keepdims=False), slot, axis=1)

            return jax.vmap(one)(rows, slot)

        return jnp.moveaxis(moved(of_rows, x), 2, 1)

    return {name: Codes(*map(take, codes)) for name, codes in parts.items()}, jnp.where(found, wanted, -1)


def total_bytes(cache: Cache) -> int:
    """Bytes of a cache's arrays, or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))

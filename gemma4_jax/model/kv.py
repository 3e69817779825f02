"""Keys and values with the positions they belong to, and the cache that decoding writes.

A slot holds the token whose position is slot modulo size; masks come from positions, so a ring of `sliding_window`
slots needs no mode flag and a cache as long as the context is a ring that never wraps.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.sharding import activation_spec, current_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """What queries look at: k, v [B, S, K, H]; positions int32 [B, S], -1 where empty; segment ids or None.

    `aligned` says that key s and query s are the same token, which lets sliding attention skip what lies outside the
    window; a cache is not aligned.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None = None
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer that owns some (k, v [B, slots, K, H]), and the positions in each kind's slots."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    positions: dict[LayerKind, jax.Array]


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


def empty_cache(cfg: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike, ahead: int = 1) -> Cache:
    """A cache without tokens."""
    size = {kind: slots(cfg, kind, max_length, ahead) for kind in KINDS}
    shapes = [(batch, size[kind], cfg.kv_heads(kind), cfg.head_size(kind)) for kind in owner_kinds(cfg)]
    return Cache(
        tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes),
        {kind: jnp.full((batch, size[kind]), -1, jnp.int32) for kind in KINDS},
    )


def slot_of(positions_BT: jax.Array, size: int) -> jax.Array:
    """The slot each new token is written to; `size` (out of range) for padding and for what this write overtakes."""
    last = jnp.max(positions_BT, axis=1, keepdims=True)
    keep = (positions_BT >= 0) & (positions_BT > last - size)
    return jnp.where(keep, positions_BT % size, size)


def write(slots_BS: jax.Array, slot_BT: jax.Array, new_BT: jax.Array) -> jax.Array:
    """slots [B, S, ...] with new [B, T, ...] put where `slot_of` says; out-of-range slots are dropped.

    On a mesh every device writes what falls into its own slots; the cache does not move.
    """
    mesh = current_mesh()
    if mesh is None:
        return _write_here(slots_BS, slot_BT, new_BT)
    rest = ("kv_heads", None) if slots_BS.ndim == 4 else (None,) * (slots_BS.ndim - 2)
    cache_spec = activation_spec(mesh, ("batch", "slots", *rest), slots_BS.shape)
    new_spec = PartitionSpec(cache_spec[0], None, *cache_spec[2:])
    cut = cache_spec[1] is not None

    def island(slots, slot, new):
        if cut:
            local = slot - jax.lax.axis_index("context") * slots.shape[1]
            slot = jnp.where(local >= 0, local, slots.shape[1])  # a negative slot would count from the end
        return _write_here(slots, slot, new)

    specs = (cache_spec, PartitionSpec(*new_spec[:2]), new_spec)
    mapped = jax.shard_map(island, mesh=mesh, in_specs=specs, out_specs=cache_spec, check_vma=False)
    return mapped(slots_BS, slot_BT, new_BT)


def _write_here(slots_BS: jax.Array, slot_BT: jax.Array, new_BT: jax.Array) -> jax.Array:
    row = jnp.broadcast_to(jnp.arange(slot_BT.shape[0])[:, None], slot_BT.shape)
    return slots_BS.at[row, slot_BT].set(new_BT.astype(slots_BS.dtype), mode="drop")

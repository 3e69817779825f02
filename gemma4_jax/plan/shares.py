"""What one device of a mesh holds of a model, exactly: parameters where they rest and where they are used, and caches."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
from jax.sharding import PartitionSpec

from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.model.kv import CACHE_DIMS, owner_kinds, slots
from gemma4_jax.model.layouts import CacheFormat, widths
from gemma4_jax.model.parameters import is_trainable, variables
from gemma4_jax.model.transformer import abstract
from gemma4_jax.sharding import AXES, NEVER_CUT, activation_spec, axes_in, stored_spec, use_spec

Sizes = tuple[int, ...]
"""Devices along each axis of AXES."""


def sizes_of(mesh: Mapping[str, int]) -> Sizes:
    """From axis -> size; missing axes have one device."""
    return tuple(mesh.get(axis, 1) for axis in AXES)


@functools.lru_cache(maxsize=65536)
def along(sizes: Sizes, axes: tuple[str, ...]) -> int:
    """Devices along these axes."""
    return math.prod(size for axis, size in zip(AXES, sizes, strict=True) if axis in axes)


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array in the tiles of a TPU: [.., 8, 128], fewer rows as a power of two, one row as lanes only."""
    if not shape:
        return 512
    if len(shape) == 1:
        return -(-shape[0] // 128) * 128 * itemsize
    rows, columns = shape[-2:]
    rows = 1 << (rows - 1).bit_length() if rows < 8 else -(-rows // 8) * 8
    return math.prod(shape[:-2]) * rows * (-(-columns // 128) * 128) * itemsize


@dataclasses.dataclass(frozen=True)
class Share:
    """One parameter. `layers` is how many layers it is stacked over; 1 for those outside of the stacks."""

    name: str
    trainable: bool
    layers: int
    stored: tuple[int, ...]  # shape of a device's part at rest, all layers
    used: tuple[int, ...]  # of one layer, as it is multiplied with
    gathered_over: tuple[str, ...]  # axes it is gathered over for use
    stored_over: tuple[str, ...]  # all axes that cut it at rest

    @functools.cached_property
    def elements(self) -> int:
        """Numbers at rest."""
        return math.prod(self.stored)

    @functools.cached_property
    def used_elements(self) -> int:
        """Numbers of one layer in use."""
        return math.prod(self.used)

    @functools.cached_property
    def in_stack(self) -> str:
        """own.sliding, own.full, shared.sliding, shared.full, or nothing."""
        return ".".join(self.name.split(".")[:2]) if self.name.startswith(("own.", "shared.")) else ""

    @property
    def is_table(self) -> bool:
        """Cut by rows of the vocabulary and never gathered."""
        return self.name in ("embed.w", "per_layer.table.w")


@functools.lru_cache(maxsize=8)
def _parameters(cfg: ModelConfig) -> tuple[tuple[str, bool, tuple[str, ...], tuple[int, ...]], ...]:
    found = variables(abstract(cfg)).items()
    return tuple((name, is_trainable(v), tuple(v.dims), tuple(v.get_value().shape)) for name, v in found)


@functools.lru_cache(maxsize=2048)
def shares(cfg: ModelConfig, sizes: Sizes) -> tuple[Share, ...]:
    """Every parameter's share on a mesh."""
    mesh = _mesh(sizes)
    found = []
    for name, trainable, dims, shape in _parameters(cfg):
        stacked = sum(dim in NEVER_CUT[:2] for dim in dims)
        stored, used = stored_spec(mesh, dims, shape), use_spec(mesh, dims, shape)
        of_use = {axis for entry in used for axis in axes_in(entry)}
        of_rest = [axis for entry in stored for axis in axes_in(entry)]
        found.append(
            Share(
                name,
                trainable,
                math.prod(shape[:stacked]),
                local(shape, stored, sizes),
                local(shape, used, sizes)[stacked:],
                tuple(axis for axis in of_rest if axis not in of_use),
                tuple(of_rest),
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=2048)
def of_layers(cfg: ModelConfig, sizes: Sizes) -> Mapping[str, tuple[Share, ...]]:
    """own.sliding, own.full, ... -> the parameters of that kind of layer."""
    found: dict[str, tuple[Share, ...]] = {}
    for share in shares(cfg, sizes):
        if share.in_stack:
            found[share.in_stack] = (*found.get(share.in_stack, ()), share)
    return found


@functools.lru_cache(maxsize=2048)
def resting_bytes(cfg: ModelConfig, sizes: Sizes, itemsize: int, trained_only: bool = False) -> float:
    """All parameters at rest, or those that are trained."""
    chosen = (share for share in shares(cfg, sizes) if share.trainable or not trained_only)
    return float(sum(tiled_bytes(share.stored, itemsize) for share in chosen))


@functools.lru_cache(maxsize=2048)
def gathered_bytes(cfg: ModelConfig, sizes: Sizes, layer: str, itemsize: int) -> float:
    """One layer's weights as they are used, where they have to be gathered for it."""
    chosen = (share for share in of_layers(cfg, sizes)[layer] if share.gathered_over)
    return float(sum(tiled_bytes(share.used, itemsize) for share in chosen))


def local(shape: Sequence[int], spec: PartitionSpec, sizes: Sizes) -> tuple[int, ...]:
    """Shape of a device's part."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return tuple(size // along(sizes, axes_in(entry)) for size, entry in zip(shape, entries, strict=True))


def cache_bytes(cfg: ModelConfig, sizes: Sizes, rows: int, length: int, itemsize: int) -> float:
    """What is stored of all layers that own keys and values, in the default layout, with the positions."""
    mesh, total = _mesh(sizes), 0
    for kind in KINDS:
        count = slots(cfg, kind, length)
        layers = sum(owner == kind for owner in owner_kinds(cfg))
        for width in widths(cfg, kind, CacheFormat.of(cfg)).values():
            shape = (rows, cfg.kv_heads(kind), count, width)
            total += layers * tiled_bytes(local(shape, activation_spec(mesh, CACHE_DIMS, shape), sizes), itemsize)
        where = (rows, count)
        total += tiled_bytes(local(where, activation_spec(mesh, ("batch", "slots"), where), sizes), 4)
    return float(total)


def device_groups(sizes: Sizes, axes: Sequence[str]) -> np.ndarray:
    """Device numbers [groups, members] along axes."""
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    inner = [AXES.index(axis) for axis in AXES if axis in axes]
    outer = [index for index in range(len(sizes)) if index not in inner]
    return ids.transpose([*outer, *inner]).reshape(-1, math.prod(sizes[index] for index in inner))


def _mesh(sizes: Sizes) -> SimpleNamespace:
    """As much of a mesh as specs are made from."""
    return SimpleNamespace(shape=dict(zip(AXES, sizes, strict=True)))

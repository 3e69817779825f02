"""What one device of a mesh holds of a model, exactly: parameters where they rest and where they are used, and caches."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec

from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.model.kv import CACHE_DIMS, owner_kinds, slots
from gemma4_jax.model.layouts import CacheFormat, widths
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.lora import MARK, LoraConfig, adapted_shapes
from gemma4_jax.model.parameters import is_trainable, modules, variables
from gemma4_jax.model.transformer import abstract
from gemma4_jax.quant.packed import Packed
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
    """One array of the model. `layers` is how many layers it is stacked over; 1 for those outside of the stacks."""

    name: str
    trainable: bool
    layers: int
    stored: tuple[int, ...]  # shape of a device's part at rest, all layers
    used: tuple[int, ...]  # of one layer, as it is multiplied with
    gathered_over: tuple[str, ...]  # axes it is gathered over for use
    stored_over: tuple[str, ...]  # all axes that cut it at rest
    itemsize: int | None = None  # bytes of a number whose dtype is its own (adapters, codes); None: the parameters'
    per_byte: int = 0  # codes in a byte; 0: numbers. `stored` has the bytes then, `used` the decoded weight

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

    def sent_bytes(self, itemsize: int) -> float:
        """Of one layer, when it is gathered for use in numbers of `itemsize` bytes: codes travel as they are."""
        return self.used_elements / self.per_byte if self.per_byte else float(self.used_elements * itemsize)

    @property
    def is_adapter(self) -> bool:
        """Whether it is half of an adapter."""
        return MARK in self.name

    @property
    def is_matrix(self) -> bool:
        """Whether rows of tokens are multiplied with it."""
        return self.name.endswith(".w") or self.is_adapter

    @property
    def is_table(self) -> bool:
        """Cut by rows of the vocabulary and never gathered."""
        return self.name in ("embed.w", "per_layer.table.w")


class _Array(NamedTuple):
    """Of the whole model. `bytes_dim`: the dim along which `per_byte` codes lie in a byte."""

    name: str
    trainable: bool
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int | None
    per_byte: int = 0
    bytes_dim: int = 0


@functools.lru_cache(maxsize=8)
def _arrays(cfg: ModelConfig, lora: LoraConfig | None) -> tuple[_Array, ...]:
    model = abstract(cfg) if lora is None else adapted_shapes(abstract(cfg), lora)
    weights = {path: module for path, module in modules(model) if isinstance(module, Weight)}
    found = []
    for name, v in variables(model).items():
        trainable = is_trainable(v) if lora is None else MARK in name
        own = v.dtype.itemsize if v.get_metadata().get("exact") else None
        path, _, last = name.rpartition(".")
        coded = weights[path].packed if last == "w" and path in weights else None
        where = (coded.per_byte, v.get_value().ndim - weights[path].n_out - 1) if isinstance(coded, Packed) else ()
        found.append(_Array(name, trainable, tuple(v.dims), tuple(v.get_value().shape), own, *where))
    return tuple(found)


@functools.lru_cache(maxsize=2048)
def shares(cfg: ModelConfig, sizes: Sizes, lora: LoraConfig | None = None) -> tuple[Share, ...]:
    """Every array's share on a mesh; with `lora` those of the adapters and of the base that they are trained beside."""
    mesh = _mesh(sizes)
    found = []
    for name, trainable, dims, shape, itemsize, per_byte, bytes_dim in _arrays(cfg, lora):
        stacked = sum(dim in NEVER_CUT[:2] for dim in dims)
        stored, used = stored_spec(mesh, dims, shape), use_spec(mesh, dims, shape)
        of_use = {axis for entry in used for axis in axes_in(entry)}
        of_rest = [axis for entry in stored for axis in axes_in(entry)]
        in_use = list(local(shape, used, sizes))
        if per_byte:
            in_use[bytes_dim] *= per_byte
        found.append(
            Share(
                name,
                trainable,
                math.prod(shape[:stacked]),
                local(shape, stored, sizes),
                tuple(in_use[stacked:]),
                tuple(axis for axis in of_rest if axis not in of_use),
                tuple(of_rest),
                itemsize,
                per_byte,
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=2048)
def of_layers(cfg: ModelConfig, sizes: Sizes, lora: LoraConfig | None = None) -> Mapping[str, tuple[Share, ...]]:
    """own.sliding, own.full, ... -> the parameters of that kind of layer."""
    found: dict[str, tuple[Share, ...]] = {}
    for share in shares(cfg, sizes, lora):
        if share.in_stack:
            found[share.in_stack] = (*found.get(share.in_stack, ()), share)
    return found


@functools.lru_cache(maxsize=2048)
def resting_bytes(
    cfg: ModelConfig, sizes: Sizes, itemsize: int, trained: bool | None = None, lora: LoraConfig | None = None
) -> float:
    """All parameters at rest, or those that are trained, or those that are not."""
    chosen = (share for share in shares(cfg, sizes, lora) if trained is None or share.trainable == trained)
    return float(sum(tiled_bytes(share.stored, share.itemsize or itemsize) for share in chosen))


@functools.lru_cache(maxsize=2048)
def moment_bytes(cfg: ModelConfig, sizes: Sizes, itemsize: int, lora: LoraConfig | None = None) -> float:
    """A number of `itemsize` bytes beside each one that is trained."""
    return float(sum(tiled_bytes(share.stored, itemsize) for share in shares(cfg, sizes, lora) if share.trainable))


@functools.lru_cache(maxsize=2048)
def gathered_bytes(cfg: ModelConfig, sizes: Sizes, layer: str, itemsize: int, lora: LoraConfig | None = None) -> float:
    """One layer's weights as they are used, where they have to be gathered or decoded for it."""
    chosen = (share for share in of_layers(cfg, sizes, lora)[layer] if share.gathered_over or share.per_byte)
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

"""Seconds that a collective takes on the links between chips.

Where devices stand is an array of places; a group of them that talks spans a box of the torus. All links of the box are
taken to work at once, in both directions where a dimension closes into a ring and is whole. Groups that interleave share
their links. The slow network between slices, and between hosts of GPUs, is a second stage that follows the first. Latency
and compute on the way are left out: these are lower bounds.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from gemma4_jax.chips import Chip, Topology
from gemma4_jax.plan.costs import Collective


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where the devices of a mesh stand, in mesh order."""

    topology: Topology
    slices: np.ndarray  # [devices]: pod, or host of GPUs
    chips: np.ndarray  # [devices, torus dims]
    cores: np.ndarray  # [devices]


def places_of(topology: Topology, devices: Sequence[Any]) -> Places:
    """Places of the devices of a mesh, given as `mesh.devices.flat`."""
    chip = topology.chip
    if not chip.torus_dims:
        per_host = topology.shape[-1]
        hosts = np.array([device.id // per_host for device in devices])
        return Places(topology, hosts, np.zeros((len(devices), 0), int), np.zeros(len(devices), int))
    slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
    chips = np.array([list(device.coords)[: chip.torus_dims] for device in devices])
    return Places(topology, slices, chips, np.array([device.core_on_chip for device in devices]))


@dataclasses.dataclass(eq=False)
class _Stand:
    """As much of a jax.Device as `mesh_utils` looks at."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    device_kind: str
    platform: str
    slice_index: int
    process_index: int = 0


@functools.cache
def places(topology: Topology, shape: tuple[int, ...], slices: int = 1) -> Places:
    """Places of a mesh of this shape as `sharding.make_mesh` would lay it out, without libtpu."""
    chip = topology.chip
    stands = []
    for index in range(slices):
        for at in np.ndindex(*reversed(topology.shape)):
            coords = (*reversed(at), 0, 0)[:3] if chip.torus_dims else (0, 0, 0)
            for core in range(chip.devices_per_chip):
                kind = chip.device_kinds[0]
                stands.append(_Stand(len(stands), coords, core, kind, chip.platform, index))
    if len(stands) == 1 or not chip.torus_dims:
        grid = np.array(stands)
    elif slices > 1:
        inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, stands, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, stands, allow_split_physical_axes=True)
    return places_of(topology, list(grid.flat))


def seconds(collective: Collective, where: Places) -> float:
    """Time of all calls of one collective."""
    return collective.calls * call_seconds(collective.kind, collective.bytes, collective.groups, where)


def call_seconds(kind: str, size: float, groups: np.ndarray, where: Places) -> float:
    """Time of one call; `size` as `Collective.bytes`."""
    if groups.shape[1] == 1 or not size:
        return 0.0
    if kind == "collective-permute":
        return _permute(size, groups, where)
    box = _box(tuple(groups[0]), where)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return box.exchange(size)
    return box.gather(size) * (2 if kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Box:
    """The part of the network that one group spans.

    `dims` holds for each torus dimension it extends over (chips, bytes per second out of a chip in both directions).
    """

    chip: Chip
    dims: tuple[tuple[int, float], ...]
    chips: int  # in one slice
    cores: int  # of each chip
    slices: int

    def gather(self, size: float) -> float:
        """All-gather into `size` bytes a device, or reduce-scatter of them.

        A chip both of whose devices belong to the group takes everything once and hands it over inside.
        """
        copies = self.chip.devices_per_chip / self.cores
        time = 0.0
        if self.slices > 1:
            time += copies * size * (self.slices - 1) / self.slices / (self.chips * self._slow)
        if self.chips > 1:
            time += copies * size * (self.chips - 1) / self.chips / sum(rate for _, rate in self.dims)
        if self.cores > 1:
            inside = size * (self.cores - 1) / self.cores / self.chip.core_bandwidth
            time = max(time, inside)
        return time

    def exchange(self, size: float) -> float:
        """All-to-all of `size` bytes a device: half of everything crosses the middle of the longest dimension."""
        out = self.chip.devices_per_chip * size  # of a chip
        time = 0.0
        if self.slices > 1:
            time += out * (self.slices - 1) / self.slices / self._slow
        if self.chips > 1 and not self.chip.torus_dims:
            time += out * (self.chips - 1) / self.chips / self.chip.link_bandwidth
        elif self.chips > 1:
            time += max(length * out / (4 * rate) for length, rate in self.dims)
        elif self.cores > 1:
            time += size / 2 / self.chip.core_bandwidth
        return time

    @property
    def _slow(self) -> float:
        return self.chip.dcn_bandwidth


@functools.lru_cache(maxsize=8192)
def _box(group: tuple[int, ...], where: Places) -> Box:
    members = np.array(group)
    topology, chip = where.topology, where.topology.chip
    slices = len(np.unique(where.slices[members]))
    if not chip.torus_dims:
        together = len(members) // slices
        return Box(chip, ((together, chip.link_bandwidth),), together, 1, slices)
    stands = where.chips[members][where.slices[members] == where.slices[members[0]]]
    chips = np.unique(stands, axis=0)
    dims = []
    for at, whole, wraps in zip(chips.T, topology.shape, topology.wraps, strict=True):
        distinct = np.unique(at)
        if len(distinct) == 1:
            continue
        stride = int(np.diff(distinct).min())
        ring = wraps and len(distinct) * stride == whole
        dims.append((len(distinct), chip.link_bandwidth * (2 if ring else 1) / stride))
    if math.prod(length for length, _ in dims) != len(
        chips
    ):  # scattered, not a box: one way to each is all we count on
        dims = [(len(chips), min(rate for _, rate in dims))]
    return Box(chip, tuple(dims), len(chips), max(1, len(stands) // len(chips)), slices)


def _permute(size: float, pairs: np.ndarray, where: Places) -> float:
    """Every pair's bytes go along one dimension after the other, the shorter way round; the busiest link decides."""
    chip = where.topology.chip
    loads: dict[tuple, float] = collections.defaultdict(float)
    slow = 0
    for source, to in pairs:
        if where.slices[source] != where.slices[to]:
            slow = 1
            continue
        at = list(where.chips[source])
        if not chip.torus_dims:
            loads["switch", source] += 1
        elif np.array_equal(at, where.chips[to]) and source != to:
            loads["chip", *at, where.cores[source]] += chip.link_bandwidth / chip.core_bandwidth
        for dim, (whole, wraps) in enumerate(zip(where.topology.shape, where.topology.wraps, strict=True)):
            if not chip.torus_dims:
                break
            distance = int(where.chips[to][dim] - at[dim])
            if wraps and abs(distance) * 2 > whole:
                distance -= int(np.sign(distance)) * whole
            for _ in range(abs(distance)):
                step = int(np.sign(distance))
                loads[where.slices[source], *at, dim, step] += 1
                at[dim] = (at[dim] + step) % whole
    fast = max(loads.values(), default=0) * size / chip.link_bandwidth
    return max(fast, slow * size * chip.devices_per_chip / chip.dcn_bandwidth)


def by_axes(collectives: Sequence[Collective], where: Places) -> Mapping[tuple[str, ...], float]:
    """Mesh axes -> seconds of all collectives along them."""
    found: dict[tuple[str, ...], float] = {}
    for each in collectives:
        found[each.axes] = found.get(each.axes, 0.0) + seconds(each, where)
    return found

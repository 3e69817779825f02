"""Where arrays live on a mesh: the axes, one table from dim names to axes, and the specs that follow.

A mesh always has the five axes of `AXES`, most of them of size 1. Model code names dims and never axes. It runs under
`jax.set_mesh(mesh)`; without a mesh nothing here does anything.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma4_jax.errors import UserError
from gemma4_jax.options import option

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Outermost first: neighbours on `tensor` are neighbours on the chips' network; `data` may cross slower ones."""

STORED_OVER = ("fsdp", "expert", "context", "tensor")
"""Axes that PARAMETERS leaves idle for a parameter cut it once more where it rests; it is gathered over them for use."""

VOCABULARY = STORED_OVER
"""The devices along these axes hold one table together: lookup and loss send tokens round them, never rows."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "vocab": VOCABULARY,
    "experts": ("expert",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffw": ("tensor",),
    "expert_ffw": ("tensor",),
}
"""How a parameter is cut where it is used. Optimizer moments lie where their parameter lies."""

NEVER_CUT = ("blocks", "layers_in_block", "gate_up", "tower_layers")
"""Dims that a loop or a reshape goes through."""

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "media": ("data", "fsdp", "expert"),
    "length": ("context",),
    "slots": ("context",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffw": ("tensor",),
}
"""How activations and caches are cut; every other dim is whole on each device. `media`: images, frames and clips; the towers'
weights are whole where they are used, because a tower is small beside its text model."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. What is none is chosen; all of them multiply to the number of devices."""

    data: int | None = option(
        None, "copies of the model, each with its share of the batch; the axis for slow networks", may_change=True
    )
    fsdp: int | None = option(
        None, "devices that share out parameters and the batch; parameters are gathered for use", may_change=True
    )
    expert: int | None = option(None, "devices that share out experts (26B-A4B), and the batch", may_change=True)
    context: int | None = option(None, "devices that share out each sequence", may_change=True)
    tensor: int | None = option(None, "devices that share out heads and feed-forward columns", may_change=True)
    slices: int = option(1, "pods joined by the slow network; data is a multiple of it", may_change=True)
    devices: int | None = option(None, "use only so many, the first ones; none: all", may_change=True)

    def __post_init__(self) -> None:
        for name in (*AXES, "slices", "devices"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"mesh.{name} is at least 1, got {size}.")

    def sizes(self) -> dict[str, int | None]:
        """Axis -> size or None, in the order of AXES."""
        return {name: getattr(self, name) for name in AXES}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, slices: int = 1) -> jax.sharding.Mesh:
    """The mesh over all devices (or those given), ordered so that inner axes have the fastest links.

    `sizes` names every axis of AXES or leaves it at 1; `slices` of the data axis lie on different pods.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes.get(name, 1) for name in AXES)
    check_product(dict(zip(AXES, shape, strict=True)), len(devices))
    if shape[0] % slices:
        raise UserError(f"mesh.data={shape[0]} must be a multiple of mesh.slices={slices}.")
    if slices > 1:
        inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_product(sizes: Mapping[str, int], devices: int) -> None:
    """UserError unless the axes multiply to the number of devices."""
    places = math.prod(sizes.values())
    if places != devices:
        listed = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"The mesh {listed} has {places} places for {devices} devices; the axes must multiply to the number of devices. "
            "Leave one of config.mesh's axes at none to have it filled in."
        )


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that `jax.set_mesh` set, if it has more than one device and we are not inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return None
    return mesh


def size_of(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axes: Iterable[str]) -> int:
    """Devices along these axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def heads_divide(tensor: int, heads: int, kv_heads: int) -> bool:
    """Whether `tensor` devices can share out these heads: as many query heads each, and whole key/value heads or one that
    several devices hold."""
    return heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)


def axes_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of one dim of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """x with its dims cut as ACTIVATIONS says; x itself without a mesh. A dim the axes do not divide stays whole."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, dims, x.shape))


def activation_spec(mesh, dims: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The spec of an activation or a cache from the names of its dims."""
    cut = []
    for name, size in zip(dims, shape, strict=True):
        axes = tuple(axis for axis in ACTIVATIONS.get(name or "", ()) if mesh.shape[axis] > 1)
        cut.append(axes if axes and size % size_of(mesh, axes) == 0 else ())
    return _spec(cut)


def use_spec(mesh, dims: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """How a parameter is cut while it is used: by PARAMETERS alone."""
    return _spec(_used(mesh, dims, shape))


def stored_spec(mesh, dims: Sequence[str], shape: Sequence[int], keep_whole: Sequence[str] = ()) -> PartitionSpec:
    """How a parameter is cut where it rests: by PARAMETERS, then over STORED_OVER.

    Each idle axis cuts the dim that leaves the fewest bytes per device in the tiles of a TPU (a last dim of 84 takes
    128), the first such dim if several do. An axis that divides no dim leaves the parameter replicated along it.
    The dims named by `keep_whole` are not cut at all.
    """
    cut = [() if name in keep_whole else axes for name, axes in zip(dims, _used(mesh, dims, shape), strict=True)]
    taken = {axis for axes in cut for axis in axes}
    for axis in STORED_OVER:
        if axis in taken or mesh.shape[axis] == 1:
            continue
        local = [size // size_of(mesh, axes) for size, axes in zip(shape, cut, strict=True)]
        best = None
        for index, name in enumerate(dims):
            if name in NEVER_CUT or name in keep_whole or local[index] % mesh.shape[axis]:
                continue
            smaller = [*local[:index], local[index] // mesh.shape[axis], *local[index + 1 :]]
            cost = _tiled_size(smaller)
            if best is None or cost < best[0]:
                best = cost, index
        if best is not None:
            cut[best[1]] = (*cut[best[1]], axis)
    return _spec(cut)


def parameter_shardings(mesh: jax.sharding.Mesh) -> Callable[..., NamedSharding]:
    """(name, variable) -> where the variable rests; what `gemma4_jax.load` and the train state place arrays by."""

    def sharding(_name: str, variable) -> NamedSharding:
        return NamedSharding(mesh, stored_spec(mesh, variable.dims, variable.shape))

    return sharding


def rest(w: jax.Array, dims: Sequence[str], keep_whole: Sequence[str] = ()) -> jax.Array:
    """A parameter cut as it rests, but not along the dims `keep_whole`; w itself without a mesh."""
    mesh = current_mesh()
    return w if mesh is None else jax.lax.with_sharding_constraint(w, stored_spec(mesh, dims, w.shape, keep_whole))


@functools.lru_cache(maxsize=16)
def batch_share(mesh: jax.sharding.Mesh | None) -> tuple[int, int]:
    """(index, count): which of `count` equal shares of each batch this process feeds.

    Processes whose devices differ only along `context` and `tensor` feed the same rows.
    """
    if mesh is None:
        return 0, 1
    places = mesh.devices.reshape(size_of(mesh, ACTIVATIONS["batch"]), -1)
    shares: dict[tuple[int, ...], set[int]] = {}
    rows_of: dict[int, set[int]] = {}
    for row, devices in enumerate(places):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    for process, rows in rows_of.items():
        shares.setdefault(tuple(sorted(rows)), set()).add(process)
    blocks = sorted(shares)
    if len({len(rows) for rows in blocks}) > 1 or sum(map(len, blocks)) != len(places):
        raise UserError(
            f"The devices of the {len(rows_of)} processes do not hold equal, separate parts of the batch on the mesh "
            f"{shape_of(mesh)}; make data x fsdp x expert a multiple or a divisor of the number of processes."
        )
    mine = next(rows for rows, processes in shares.items() if jax.process_index() in processes)
    return blocks.index(mine), len(blocks)


def place_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """This process's rows [rows, length] of each array as its part of the global batch on the mesh that is set.

    What is no array, a batch's media or what a teacher said of it, says itself what its dims are (`with_dims`).
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return batch
    count = batch_share(mesh)[1]

    def place(rows: np.ndarray, dims: tuple[str | None, ...]) -> jax.Array:
        shape = tuple(size * count if name in SHARED_OUT else size for name, size in zip(dims, rows.shape, strict=True))
        sharding = NamedSharding(mesh, activation_spec(mesh, dims, shape))
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows), shape)

    return {
        name: rows.with_dims(place) if hasattr(rows, "with_dims") else place(rows, ("batch", "length"))
        for name, rows in batch.items()
    }


SHARED_OUT = ("batch", "media")
"""Dims of which each process feeds a share."""


def media_multiple(mesh: jax.sharding.Mesh | None) -> int:
    """Devices over which a process spreads its share of the pictures of a batch: their number must divide by it."""
    return 1 if mesh is None else size_of(mesh, ACTIVATIONS["media"]) // batch_share(mesh)[1]


def check_batch(mesh: jax.sharding.Mesh | None, rows: int, length: int, section: str = "data") -> None:
    """UserError unless a batch [rows, length] can be cut evenly."""
    if mesh is None:
        return
    for size, dim, what, key in (
        (rows, "batch", "sequences at a time", "batch_size"),
        (length, "length", "tokens in a sequence", "seq_len"),
    ):
        axes = ACTIVATIONS[dim]
        if size % size_of(mesh, axes):
            over = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise UserError(
                f"{size} {what} cannot be shared out over {over}; wanted a multiple of {size_of(mesh, axes)}: change "
                f"{section}.{key} or the mesh."
            )


def shape_of(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """`fsdp 4 x tensor 2`: the axes with more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def gather(w: jax.Array, dims: Sequence[str], keep_whole: Sequence[str] = ()) -> jax.Array:
    """A resting parameter (see `rest`) cut as it is used; its gradient goes straight back to where it rests.

    `dims` are the names of w's own dims. Written with its own derivative: that of a plain constraint would gather the
    gradient too, before it is scattered.
    """
    mesh = current_mesh()
    if mesh is None:
        return w
    stored, used = stored_spec(mesh, dims, w.shape, keep_whole), use_spec(mesh, dims, w.shape)

    @jax.custom_vjp
    def move(w):
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(w, stored), used)

    move.defvjp(lambda w: (move(w), None), lambda _, d: (jax.lax.with_sharding_constraint(d, stored),))
    return move(w)


def used(x: jax.Array, dims: Sequence[str]) -> jax.Array:
    """A resting array that is not trained cut as it is used; x itself without a mesh. For codes, which have no derivative."""
    mesh = current_mesh()
    if mesh is None:
        return x
    x = jax.lax.with_sharding_constraint(x, stored_spec(mesh, dims, x.shape))
    return jax.lax.with_sharding_constraint(x, use_spec(mesh, dims, x.shape))


def _used(mesh, dims: Sequence[str], shape: Sequence[int]) -> list[tuple[str, ...]]:
    cut: list[tuple[str, ...]] = []
    for name, size in zip(dims, shape, strict=True):
        axes = tuple(axis for axis in PARAMETERS.get(name, ()) if mesh.shape[axis] > 1)
        cut.append(axes if axes and size % size_of(mesh, axes) == 0 else ())
    return cut


def _spec(cut: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in cut))


def _tiled_size(shape: Sequence[int]) -> int:
    """Elements that an array takes in the (8, 128) tiles of a TPU; up to 8 rows are padded to a power of two only."""
    if len(shape) < 2:
        return -(-math.prod(shape) // 128) * 128
    rows, columns = shape[-2:]
    rows = 1 << (rows - 1).bit_length() if rows < 8 else -(-rows // 8) * 8
    return math.prod(shape[:-2]) * rows * (-(-columns // 128) * 128)

"""Writing a model for other programs: one loop over a source's tensors that every format shares.

A format says how each tensor is stored (`Storage`); the loop rounds rows to their grid once, hands codes and scales to the format,
and compares what the file will decode to with what the forward pass computes. They must be equal, or the user has said otherwise.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.checkpoint.canvas import Canvas
from gemma4_jax.checkpoint.lattice import Drift, Encoded, check_finite, decode, encode
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.source import Source, is_coded
from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import BlockGrid

Pack = Callable[[slice, Any], Iterable[tuple[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Storage:
    """How one tensor is stored.

    label: the storage type, for people. tensors: (kind, shape) of each tensor of the file that it becomes; kind as the format's
    header has it. pack: (rows, `Encoded`; without `grid` float32 values) -> (tensor of the file, its next values). held: what
    the file decodes to, float32, from the same argument; None: exactly what was packed.
    """

    label: str
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]]
    pack: Pack
    grid: BlockGrid | None = None
    held: Callable[[Any], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of one tensor: what the manifest says about it. error and power: squared sums of difference and weights."""

    name: str
    label: str
    grid: str | None
    shape: tuple[int, ...]
    error: float
    power: float
    blocks: int
    off: int

    @property
    def relative_error(self) -> float:
        """Root of the squared error over the squared weights."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All tensors, and how long writing took."""

    fates: tuple[Fate, ...]
    seconds: float
    read_bytes: int


def write(
    source: Source,
    storages: Mapping[str, Storage],
    files: Mapping[str, tuple[Path, bytes, dict[str, tuple[int, int]]]],
    *,
    requantise: bool = False,
    extras: Mapping[str, np.ndarray] | None = None,
) -> Outcome:
    """Fills the files: every tensor of the source as its storage says, and `extras` as they are.

    Args:
      source: what to write.
      storages: for each of its tensors.
      files: (path, what stands before the data, places) by any key.
      requantise: let the file hold other values than the forward pass computes.
      extras: tensors of the files that no tensor of the source becomes.

    Raises:
      UserError: values that are not finite; without `requantise`, blocks that the file cannot hold as they are.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        canvases = {key: stack.enter_context(Canvas(*file)) for key, file in files.items()}
        home = {tensor: canvas for canvas in canvases.values() for tensor in canvas.places}
        for name, values in (extras or {}).items():
            home[name].add(name, values)
        fates = tuple(_write_tensor(source, name, storages[name], home) for name in _order(source))
        if not requantise:
            _refuse_drift(source, fates)
    read = sum(int(np.prod(t.shape, dtype=np.int64)) * (4 if t.dtype == "F32" else 2) for t in source.tensors.values())
    return Outcome(tuple(sorted(fates, key=lambda fate: fate.name)), time.perf_counter() - started, read)


def _order(source: Source) -> list[str]:
    """Parameter by parameter: a stacked one is read once for all its layers."""
    place = {}
    for name in source.tensors:
        place.setdefault(source.entry(name).parameter, len(place))
    return sorted(source.tensors, key=lambda name: place[source.entry(name).parameter])


def _write_tensor(source: Source, name: str, storage: Storage, home: Mapping[str, Canvas]) -> Fate:
    """Rounds, packs and compares one tensor, block by block of rows."""
    trained, grid = source.trained.get(source.entry(name).parameter), source.grid(name)
    if storage.grid is not None and (grid is None or storage.grid.name != grid.name):
        raise ValueError(f"{name} is on {grid}, the storage wants {storage.grid}")
    drift, tensor = Drift(), source.tensors[name]
    # `base` is what the forward pass of the source computes with, `encoded` the same in codes.
    for rows, weights, base, encoded in _rounded_blocks(source, name, trained):
        given: Any = base
        if grid is not None:
            coded = encoded if encoded is not None and trained == grid else encode(grid, base)
            check_finite(coded.values, name, source.origin)
            given = coded if storage.grid is not None else coded.values
        for target, values in storage.pack(rows, given):
            home[target].add(target, values)
        exact = given.values if isinstance(given, Encoded) else given
        held = exact if storage.held is None else storage.held(given)
        if not tensor.shape:  # a clip bound of a tower, which may be infinite
            continue
        drift.add(weights, held)
        drift.compare(base, held, (grid and grid.block) or base.shape[-1])
    label = None if grid is None else grid.name
    return Fate(name, storage.label, label, tensor.shape, drift.error, drift.power, drift.blocks, drift.off)


def _rounded_blocks(
    source: Source, name: str, trained: BlockGrid | None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, Encoded | None]]:
    """(rows, weights, weights as trained, the same in codes) of a tensor, float32; codes of a file are taken as they are."""
    tensor = source.tensors[name]
    if trained is not None and is_coded(tensor):
        kept = np.dtype(trained.scale_dtype)
        for rows, encoded in tensor.coded_blocks():  # pyright: ignore[reportAttributeAccessIssue]
            check_finite(encoded.values, name, source.origin)
            scales = encoded.scales.astype(kept)
            own = Encoded(encoded.codes, scales, decode(encoded.codes, scales))
            yield rows, encoded.values, encoded.values, own
        return
    learned = None if trained is None else source.learned_scales(name)
    for rows, block in tensor.blocks():
        weights = np.asarray(block, np.float32)
        if tensor.shape:
            check_finite(weights, name, source.origin)
        if trained is None:
            yield rows, weights, weights, None
            continue
        encoded = encode(trained, weights, None if learned is None else learned[rows])
        yield rows, weights, encoded.values, encoded


def _refuse_drift(source: Source, fates: Iterable[Fate]) -> None:
    """UserError if a tensor that was trained on a grid would come out of the file with other values."""
    moved = [fate for fate in fates if fate.off and source.entry(fate.name).parameter in source.trained]
    if not moved:
        return
    off, blocks = sum(fate.off for fate in moved), sum(fate.blocks for fate in moved)
    first = moved[0]
    trained = source.trained[source.entry(first.name).parameter].name
    held = f"the grid {first.grid}" if first.grid and first.grid != trained else first.label
    tensors = listed(fate.name for fate in moved)
    raise UserError(
        f"{off} of {blocks} blocks in {len(moved)} tensors ({tensors}) lie on {trained}, where {source.origin} was trained, and "
        f"not on what {held} holds, so the file would compute something else; write another dtype or format, or set "
        "export.requantise=true to round them again."
    )


def float_storage(name: str, kind: Any, dtype: np.dtype, shape: tuple[int, ...], label: str) -> Storage:
    """Plain numbers of a dtype."""

    def pack(_: slice, values: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
        yield name, values.astype(dtype)

    def held(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    return Storage(label, {name: (kind, shape)}, pack, held=None if dtype == np.float32 else held)

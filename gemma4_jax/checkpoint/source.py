"""A checkpoint seen tensor by tensor, in blocks of rows, without the model in memory: what exports and conversions read.

Every source gives the same view: the tensors of `names.table` in Hugging Face's shapes (rows are outputs, the last axis is the
input), and the grid of each parameter that has one.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.lattice import Encoded
from gemma4_jax.checkpoint.names import Entry
from gemma4_jax.checkpoint.placement import Which
from gemma4_jax.checkpoint.safetensors_io import FLOATS, copy, row_blocks
from gemma4_jax.checkpoint.stored import open_stored
from gemma4_jax.config import ModelConfig
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.linear import Linear, Weight
from gemma4_jax.model.parameters import arrays, modules
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant.activations import SCALES
from gemma4_jax.quant.grids import BlockGrid
from gemma4_jax.quant.policy import quantisable

Kind = Literal["linear", "experts", "table", "tower", "other"]
"""Linear layers, experts stacked in one tensor, embedding tables, all of vision and audio, and norms and scalars."""
CODES = {dtype: code for code, dtype in FLOATS.items()}
DIGEST_BLOCK = 16 << 20


class Rows(Protocol):
    """One tensor: `safetensors_io.Tensor` is one, and so are the tensors of quantised files."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """A key of `safetensors_io.FLOATS`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...
    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values); each block at most about 8 MB or one row, overwritten by the next."""
        ...


class CodedRows(Rows, Protocol):
    """A tensor that is stored as codes, where `coded` says so."""

    fits: tuple[BlockGrid, ...]
    checked: bool

    @property
    def coded(self) -> bool: ...
    @property
    def grid(self) -> BlockGrid | None:
        """The grid whose codes they are, whatever rule found their scales."""
        ...

    def coded_blocks(self) -> Iterator[tuple[slice, Encoded]]:
        """(rows, codes and scales as the file has them)."""
        ...


def is_coded(tensor: Any) -> bool:
    """Whether a tensor is a `CodedRows` that has codes."""
    return getattr(tensor, "coded", False)


@dataclasses.dataclass(frozen=True)
class Source:
    """What an export needs to know about a checkpoint.

    tensors: by name without prefix, exactly those of `names.table(cfg)`. trained: parameter (`own.full.mlp.up.w`) -> the grid
    that its forward pass rounds to; scales: learned ones of these grids and static ones of activations, arrays by our dotted names
    (`own.full.mlp.up.grid_scale`). grids: those it is to be written on, the same unless a policy says otherwise. origin: where
    it came from, for people. files: all that was read, for the digest.
    """

    cfg: ModelConfig
    tensors: Mapping[str, Rows]
    grids: Mapping[str, BlockGrid]
    origin: str
    files: tuple[Path, ...] = ()
    trained: Mapping[str, BlockGrid] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def grid(self, name: str) -> BlockGrid | None:
        """The grid of a tensor."""
        return self.grids.get(self.entry(name).parameter)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies in our model."""
        return names.table(self.cfg)[name]

    def learned_scales(self, name: str) -> np.ndarray | None:
        """float32 [..., rows, blocks] of a tensor whose grid's scales were learned; None: the grid's rule finds them."""
        entry = self.entry(name)
        held = self.scales.get(f"{entry.parameter.removesuffix('.w')}.grid_scale")
        if held is None:
            return None
        return np.ascontiguousarray(np.swapaxes(_read(held, entry.index), -1, -2), np.float32)

    def activation_scales(self) -> dict[str, tuple[str, np.ndarray]]:
        """What static activations and the cache are rounded by: our name of the scale -> (name of its kind, float32 [*stack])."""
        found = {}
        for name, held in self.scales.items():
            kind = name.rsplit(".", 1)[-1]
            if kind in SCALES:
                found[name] = (kind, np.asarray(_read(held, (...,)), np.float32))
        return found

    def kind(self, name: str) -> "Kind":
        """What a tensor is in Hugging Face's model."""
        return "tower" if name.startswith(names.TOWERS) else _kinds(self.cfg).get(self.entry(name).parameter, "other")

    def text_names(self) -> list[str]:
        """The tensors of the text model."""
        return [name for name in self.tensors if not name.startswith(names.TOWERS)]

    def text_only(self) -> "Source":
        """The same without towers; itself if it has none."""
        if not self.cfg.is_multimodal:
            return self
        tensors = {name: self.tensors[name] for name in self.text_names()}
        return dataclasses.replace(self, cfg=self.cfg.text_only(), tensors=tensors)

    def model(self) -> Transformer:
        """The text model without arrays (ShapeDtypeStructs), with its grids: what policies work on; towers stay float."""
        return with_grids(abstract(self.cfg.text_only()), self.grids)

    def with_grids_of(self, model: Any) -> "Source":
        """The same weights, to be written on the grids that `model` (abstract or not) has."""
        return dataclasses.replace(self, grids=grids_of(model))

    def digest(self) -> str:
        """sha256 over the source's files in order of their names, or over its arrays where there are none."""
        total = hashlib.sha256()
        for file in sorted(self.files):
            total.update(file.name.encode())
            with file.open("rb") as opened:
                while block := opened.read(DIGEST_BLOCK):
                    total.update(block)
        if not self.files:
            for name, tensor in self.tensors.items():
                total.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                for _, block in tensor.blocks():
                    total.update(np.ascontiguousarray(block).view(np.uint8).data)
        return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """A tensor that is a view of one of our parameters, of an array in memory or one that reads what it is indexed with."""

    name: str
    array: Any
    entry: Entry

    @property
    def dtype(self) -> str:
        """As the array has it."""
        return CODES[np.dtype(self.array.dtype)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face's."""
        return self.entry.shape

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks in Hugging Face's layout; only they are copied, of a plain table only they are read."""
        item = np.dtype(self.array.dtype).itemsize
        if not self.entry.index and self.entry.inputs is None:  # an embedding table: by rows
            for rows in row_blocks(self.entry.shape, item):
                yield rows, _read(self.array, (rows,)).reshape(-1, *self.entry.shape[1:])
            return
        view = np.atleast_1d(self.entry.view(_read(self.array, self.entry.index)))
        for rows in row_blocks(view.shape, item):
            block = np.empty((rows.stop - rows.start, *view.shape[1:]), view.dtype)
            copy(block, view[rows])
            yield rows, block


def of_model(model: Transformer, origin: str = "a model in memory") -> Source:
    """A model whose arrays are in memory."""
    held = arrays(model)
    tensors = {name: ArrayRows(name, held[entry.parameter], entry) for name, entry in names.table(model.cfg).items()}
    grids, table = grids_of(model), names.table(model.cfg)
    known = {entry.parameter for entry in table.values()}
    return Source(
        *(model.cfg, tensors, grids, origin),
        trained=grids,
        scales={name: array for name, array in held.items() if name not in known},
    )


def of_path(
    path: str | os.PathLike[str],
    *,
    text_only: bool = False,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
) -> Source:
    """Whatever `load` reads: a Hugging Face directory (quantised or not), a GGUF file, one of our directories or runs.

    Raises:
      UserError: what `load` refuses, before a weight is read.
    """
    from gemma4_jax.checkpoint import load

    return load.source(path, text_only=text_only, step=step, base=base)


def of_store(directory: Any, cfg: ModelConfig, saved: Mapping[str, str], grids: Mapping[str, BlockGrid]) -> Source:
    """An Orbax step: `saved` maps our parameters' names to the names of the stored arrays."""
    opened = {parameter: open_stored(directory, stored) for parameter, stored in saved.items()}
    known = {entry.parameter for entry in names.table(cfg).values()}
    scales = {name: array for name, array in opened.items() if name not in known}
    tensors = {name: ArrayRows(name, opened[entry.parameter], entry) for name, entry in names.table(cfg).items()}
    root = os.fspath(directory)
    files = () if "://" in root else tuple(sorted(path for path in (Path(root) / "state").rglob("*") if path.is_file()))
    return Source(cfg, tensors, grids, root, files, trained=grids, scales=scales)


def grids_of(model: Any) -> dict[str, BlockGrid]:
    """Parameter -> its grid, for the weights that have one."""
    grids = {f"{path}.w": module.grid for path, module in quantisable(model) if module.grid is not None}
    return {parameter: dataclasses.replace(grid, clipped=False) for parameter, grid in grids.items()}


def with_grids(
    model: Transformer, grids: Mapping[str, BlockGrid], learned: Mapping[str, jax.Array] | None = None
) -> Transformer:
    """The same arrays in new modules, with exactly these grids; the scales in `learned` (float32, our layout) are parameters."""
    new = jax.tree.map(lambda leaf: leaf, model)
    unknown = set(grids)
    for path, module in quantisable(new):
        module.grid, module.grid_scale = grids.get(f"{path}.w"), None
        unknown.discard(f"{path}.w")
        if learned and f"{path}.w" in learned:
            module.learn_scales()
            scale: Any = module.grid_scale
            module.grid_scale = scale.replace(learned[f"{path}.w"])
    if unknown:
        raise ValueError(f"no such weights: {sorted(unknown)}")
    return new


@functools.lru_cache(maxsize=8)
def _kinds(cfg: ModelConfig) -> dict[str, "Kind"]:
    """Parameter -> what it is, for the weights."""
    found: dict[str, Kind] = {}
    for path, module in modules(abstract(cfg)):
        if isinstance(module, Linear):
            found[f"{path}.w"] = "linear"
        elif isinstance(module, Weight):
            found[f"{path}.w"] = "experts"
        elif isinstance(module, Embedding):
            found[f"{path}.w"] = "table"
    return found


def _read(array: Any, index: tuple[Any, ...]) -> np.ndarray:
    """array[index] on the host; of an array on an accelerator only that slice is copied, on a CPU nothing is."""
    if isinstance(array, jax.Array):
        on_cpu = all(device.platform == "cpu" for device in array.devices())
        return np.ascontiguousarray(np.asarray(array)[index] if on_cpu else array[index])
    return array[index]

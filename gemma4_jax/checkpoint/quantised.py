"""Hugging Face directories with a quantization_config: weights as they decode, and the grids of ours that they lie on."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.checkpoint import compressed_tensors, manifest, mobile, names
from gemma4_jax.checkpoint.hf import assemble, checkpoint_directory, read_config, text_tensors
from gemma4_jax.checkpoint.lattice import encode
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.placement import Shardings, default_device
from gemma4_jax.checkpoint.safetensors_io import Tensor
from gemma4_jax.checkpoint.shards import read_json, tensors_of
from gemma4_jax.checkpoint.source import Source, is_coded, with_grids
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import map_arrays, variables
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant.grids import BlockGrid

logger = logging.getLogger(__name__)
METHODS = {
    compressed_tensors.METHOD: compressed_tensors.packed_tensors,
    mobile.METHOD: mobile.packed_tensors,
}


def load_directory(
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    shardings: Shardings = default_device,
) -> Transformer:
    """The model of any Hugging Face directory; `load_hf` says what the arguments are.

    Packed weights become float32 (unless `dtype` says otherwise), which holds them exactly. A parameter gets the grid that every
    block of it lies on; a float directory that this project exported gets the grids of its manifest, if they still fit.
    """
    cfg, tensors = directory_tensors(path, text_only)
    model = assemble(cfg, tensors, dtype=dtype, compute_dtype=compute_dtype, shardings=shardings)
    return on_grids(model, tensors, str(path), shardings)


def directory_source(path: str | Path, text_only: bool = False) -> Source:
    """The same, tensor by tensor; a directory that has codes is read once to find their grids."""
    cfg, tensors = directory_tensors(path, text_only)
    for tensor in tensors.values():
        if getattr(tensor, "fits", ()) and not tensor.checked:
            for _ in tensor.blocks():
                pass
    grids, _ = grids_found(tensors, cfg, str(path), as_stored=True)
    files = tuple(sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".json")))
    ordered = {name: tensors[name] for name in names.table(cfg)}
    return Source(cfg, ordered, grids, str(path), files, trained=grids)


def directory_tensors(path: str | Path, text_only: bool) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and tensors by the names of `names.table`; packed ones decode as they are read.

    Raises:
      UserError: what `load_hf` refuses, or a quantisation that is not read here.
    """
    directory = checkpoint_directory(path)
    cfg = read_config(directory)
    cfg = cfg.text_only() if text_only else cfg
    stored: dict[str, Any] = dict(tensors_of(directory))
    config = quantization_config(directory)
    if config is not None:
        method = config.get("quant_method")
        if method not in METHODS:
            raise UserError(
                f"{directory} is quantised by {method!r}; this version reads {' and '.join(METHODS)}. Start from the float "
                "checkpoint."
            )
        whole = any(name.startswith(names.MULTIMODAL_PREFIX) for name in stored)
        prefix = names.MULTIMODAL_PREFIX if whole else names.TEXT_PREFIX
        dead = tuple(prefix + name.removesuffix("weight") for name in names.dead(cfg))
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(dead)} if dead else stored
        wanted = {names.in_file(name, prefix): entry.shape for name, entry in names.table(cfg).items()}
        wanted = {name: shape for name, shape in wanted.items() if len(shape) > 1}
        stored = METHODS[method](stored, config, wanted, str(directory))
    return cfg, _declared(directory, cfg, text_tensors(directory, cfg, stored, text_only))


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """config.json's quantization_config, wherever it stands; None for a float checkpoint."""
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{directory / 'config.json'} has a quantization_config that is no mapping.")
    return found


@dataclasses.dataclass
class LatticeRows:
    """A float tensor whose values are said to lie on a grid: `fits` is empty once a block of it does not."""

    tensor: Tensor
    fits: tuple[BlockGrid, ...]
    checked: bool = False

    @property
    def name(self) -> str:
        """As in its file."""
        return self.tensor.name

    @property
    def dtype(self) -> str:
        """As in its file."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As in its file."""
        return self.tensor.shape

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values), checked by the way."""
        for rows, block in self.tensor.blocks():
            if self.fits and not self.checked:
                values = np.asarray(block, np.float32)
                self.fits = tuple(grid for grid in self.fits if np.array_equal(encode(grid, values).values, values))
            yield rows, block
        self.checked = True


def _declared(directory: Path, cfg: ModelConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with the grids that the directory's manifest names as what to check them against."""
    grids = manifest.declared_grids(directory)
    table = names.table(cfg)
    for name, tensor in tensors.items():
        grid = grids.get(table[name].parameter)
        if grid is None:
            continue
        if isinstance(tensor, Tensor):
            tensors[name] = LatticeRows(tensor, (grid,))
        elif not isinstance(tensor, LatticeRows):
            tensor.declared = grid
            tensor.fits = tuple(other for other in tensor.fits if other == grid)
    return tensors


def on_grids(model: Transformer, tensors: Mapping[str, Any], where: str, shardings: Shardings) -> Transformer:
    """The model made of these tensors with the grids they lie on, scales as parameters where no rule finds them again."""
    grids, learned = grids_found(tensors, model.cfg, where)
    kept = {name: variable for name, variable in variables(model).items() if name in learned}
    scales = {name: _own_scales(name, tensors, model.cfg, kept[name].get_value().shape) for name in learned}
    model = with_grids(model, grids, {name: jnp.asarray(array) for name, array in scales.items()})
    placed = {name: variable for name, variable in variables(model).items() if name.endswith(".grid_scale")}

    def put(name: str, variable: Any) -> Any:
        value = variable.get_value()
        return jax.device_put(value, shardings(name, variable)) if name in placed else value

    return map_arrays(put, model) if placed else model


def grids_found(
    tensors: Mapping[str, Any], cfg: ModelConfig, where: str, *, as_stored: bool = False
) -> tuple[dict[str, BlockGrid], set[str]]:
    """The grid of each parameter all of whose tensors lie on it, and those of them whose scales the grid's rule does not find.

    To be asked after the tensors' blocks were read. Coded tensors on no grid of ours are counted in a log: they are float from here
    on. `as_stored`: the grid whose codes a tensor has, without asking whether its scales can be kept; right for writing the codes
    elsewhere.
    """
    table = names.table(cfg)
    groups: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(table[name].parameter, []).append(tensor)
    found: dict[str, BlockGrid] = {}
    learned: set[str] = set()
    for parameter, group in groups.items():
        fits = [grid for grid in getattr(group[0], "fits", ()) if all(grid in getattr(t, "fits", ()) for t in group)]
        if fits:
            found[parameter] = fits[0]
        elif all(is_coded(tensor) for tensor in group):
            grid = group[0].grid
            if (
                grid is not None
                and all(t.grid == grid for t in group)
                and (as_stored or _keeps(parameter, group, grid, cfg))
            ):
                found[parameter] = grid
                learned.add(parameter)
    coded = [name for name, tensor in tensors.items() if is_coded(tensor)]
    lost = [name for name in coded if table[name].parameter not in found]
    if lost:
        logger.warning(
            "%s: %d of %d quantised tensors lie on no grid of ours whose scales can be kept (%s); they are float from here on",
            *(where, len(lost), len(coded), listed(lost)),
        )
    return found, learned


def _keeps(parameter: str, group: list[Any], grid: BlockGrid, cfg: ModelConfig) -> bool:
    """Whether the grid, given the file's scales, gives the file's values; tables cannot be given scales."""
    if all(entry.inputs is None for entry in names.table(cfg).values() if entry.parameter == parameter):
        return False
    for tensor in group:
        for _, encoded in tensor.coded_blocks():
            given = encoded.scales.astype(np.float32)
            if not np.array_equal(encode(grid, encoded.values, given).values, encoded.values):
                return False
    return True


def _own_scales(parameter: str, tensors: Mapping[str, Any], cfg: ModelConfig, shape: tuple[int, ...]) -> np.ndarray:
    """The scales of all tensors of a parameter in our layout, float32 [*stack, blocks, outputs]."""
    out: np.ndarray | None = None
    for name, entry in names.table(cfg).items():
        if entry.parameter != parameter:
            continue
        rows = np.concatenate([encoded.scales.astype(np.float32) for _, encoded in tensors[name].coded_blocks()])
        own = np.swapaxes(rows, -1, -2)
        if out is None:
            out = np.empty((*shape[: len(entry.index)], *own.shape), np.float32)
        out[entry.index] = own
    assert out is not None
    return out

"""Hugging Face directories with a quantization_config: weights as they decode, and the grids of ours that they lie on."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma4_jax.checkpoint import compressed_tensors, manifest, mobile, names
from gemma4_jax.checkpoint.hf import assemble, checkpoint_directory, read_config, text_tensors
from gemma4_jax.checkpoint.lattice import encode
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.placement import Shardings, default_device
from gemma4_jax.checkpoint.safetensors_io import Tensor
from gemma4_jax.checkpoint.shards import read_json, tensors_of
from gemma4_jax.checkpoint.source import CodedRows, Source, with_grids
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
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
    return with_grids(model, grids_found(tensors, cfg, str(path)))


def directory_source(path: str | Path, text_only: bool = False) -> Source:
    """The same, tensor by tensor; a directory that has codes is read once to find their grids."""
    cfg, tensors = directory_tensors(path, text_only)
    for tensor in tensors.values():
        if getattr(tensor, "fits", ()) and not tensor.checked:
            for _ in tensor.blocks():
                pass
    grids = grids_found(tensors, cfg, str(path), as_stored=True)
    files = tuple(sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".json")))
    return Source(cfg, tensors, grids, str(path), files, trained=grids)


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
        elif any(grid == other for other in tensor.fits):
            tensor.fits = (grid,)
    return tensors


def grids_found(
    tensors: Mapping[str, Any], cfg: ModelConfig, where: str, *, as_stored: bool = False
) -> dict[str, BlockGrid]:
    """The grid of each parameter all of whose tensors lie on it; to be asked after their blocks were read.

    Packed tensors that lie on none, or not together, are counted in a log: they are float from here on. `as_stored`: also the
    grids whose codes a tensor has but whose rule for scales would not find them again; right for writing the codes elsewhere.
    """
    table = names.table(cfg)
    fits: dict[str, tuple[BlockGrid, ...]] = {}
    for name, tensor in tensors.items():
        parameter = table[name].parameter
        mine = getattr(tensor, "fits", ())
        if not mine and as_stored and getattr(tensor, "grid", None) is not None:
            mine = (tensor.grid,)
        before = fits.get(parameter, mine)
        fits[parameter] = tuple(grid for grid in before if grid in mine)
    found = {parameter: grids[0] for parameter, grids in fits.items() if grids}
    coded = [name for name, tensor in tensors.items() if is_coded(tensor)]
    lost = [name for name in coded if table[name].parameter not in found]
    if lost:
        logger.warning(
            "%s: %d of %d quantised tensors lie on no grid whose scales can be found again from their values (%s); they are "
            "float weights from here on",
            *(where, len(lost), len(coded), listed(lost)),
        )
    return found


def is_coded(tensor: Any) -> bool:
    """Whether a tensor is stored as codes."""
    return isinstance(tensor, CodedRows) or getattr(tensor, "coded", False)

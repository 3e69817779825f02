"""GGUF files of Gemma 4: written with the codes that training used, and read back as float weights and their grids."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from gemma4_jax.checkpoint import gguf_names, names
from gemma4_jax.checkpoint.canvas import beside
from gemma4_jax.checkpoint.export import Outcome, Storage, float_storage, write
from gemma4_jax.checkpoint.ggml_types import F32, GgmlType, float_type, type_for
from gemma4_jax.checkpoint.gguf_file import Metadata, Placed, Value, lay_out, read_header
from gemma4_jax.checkpoint.hf import assemble
from gemma4_jax.checkpoint.lattice import Encoded, decode, encode
from gemma4_jax.checkpoint.manifest import Manifest, path_beside, text_of
from gemma4_jax.checkpoint.mismatch import Mismatch
from gemma4_jax.checkpoint.placement import Shardings, default_device
from gemma4_jax.checkpoint.quantised import grids_found, on_grids
from gemma4_jax.checkpoint.safetensors_io import read_blocks
from gemma4_jax.checkpoint.source import Source
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant.grids import BlockGrid, grid_named

GRIDS_KEY = "gemma4_jax.grids"
"""Our own metadata key: JSON, parameter -> grid. Other programs ignore it; files without it are looked at block by block."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's `general.file_type` of a file that is mostly of this type."""


def write_gguf(
    source: Source,
    path: Path,
    *,
    dtype: str = "bfloat16",
    tokenizer: Metadata | None = None,
    name: str = "gemma4",
    requantise: bool = False,
    manifest: Manifest | None = None,
) -> Outcome:
    """Writes `path`, whole or not at all.

    Args:
      source: weights on a ggml grid (q4_0, q4_0_bf16, int4_sym7_g32, q8_0) are written as their codes, all others as `dtype`;
        vectors, norms and the router as float32.
      path: of the file; must not exist.
      dtype: float32, bfloat16 or float16.
      tokenizer: `gguf_tokenizer.metadata_of`; without it llama.cpp cannot load the file.
      name: general.name.
      requantise: see `export.write`.
      manifest: what to write beside the file.
    """
    source = source.text_only()
    storages = {tensor: _storage(source, tensor, dtype) for tensor in source.tensors}
    frequencies = gguf_names.rope_freqs(source.cfg)
    forms = {gguf_names.ROPE_FREQS: (F32, frequencies.shape)}
    for storage in storages.values():
        forms |= storage.tensors
    metadata = _general(name, storages) | gguf_names.metadata_of(source.cfg) | (tokenizer or {})
    if source.grids:
        # Not those whose scales were learned: their grid's rule does not find them again.
        plain = {name for name in source.grids if f"{name.removesuffix('.w')}.grid_scale" not in source.scales}
        grids = {parameter: grid.name for parameter, grid in source.grids.items() if parameter in plain}
        metadata[GRIDS_KEY] = Value("str", json.dumps(grids, sort_keys=True, separators=(",", ":")))
    front, placed = lay_out(metadata, forms)
    places = {tensor.name: (tensor.start, tensor.size) for tensor in placed.values()}
    extras = {gguf_names.ROPE_FREQS: frequencies}
    with ExitStack() as stack:
        partial = stack.enter_context(beside(path, what="The file"))
        notes = None if manifest is None else stack.enter_context(beside(path_beside(path), what="The manifest"))
        outcome = write(source, storages, {"": (partial, front, places)}, requantise=requantise, extras=extras)
        if manifest is not None and notes is not None:
            notes.write_text(text_of(manifest(outcome)), encoding="utf-8")
    return outcome


def _storage(source: Source, name: str, dtype: str) -> Storage:
    """How one tensor is stored."""
    target, shape, grid = gguf_names.gguf_name(name), source.tensors[name].shape, source.grid(name)
    kind = None if grid is None else type_for(grid)
    if kind is not None:
        return Storage(kind.name, {target: (kind, shape)}, _packer(target, kind), grid)
    kind = F32 if gguf_names.is_float32(target, shape) else float_type(dtype)
    assert kind.float_dtype is not None
    return float_storage(target, kind, kind.float_dtype, shape, kind.name)


def _packer(target: str, kind: GgmlType):
    pack = kind.pack
    assert pack is not None

    def packed(_: slice, encoded: Encoded) -> Iterable[tuple[str, np.ndarray]]:
        yield target, pack(encoded.codes.reshape(-1, kind.block), encoded.scales.reshape(-1, 1))

    return packed


def _general(name: str, storages: Mapping[str, Storage]) -> Metadata:
    """The `general.*` keys."""
    weights: dict[str, int] = {}
    for storage in storages.values():
        for kind, shape in storage.tensors.values():
            if len(shape) > 1:
                weights[kind.name] = weights.get(kind.name, 0) + int(np.prod(shape, dtype=np.int64))
    # A file with codes is named after them, however large the embeddings beside them are.
    coded = {kind: count for kind, count in weights.items() if kind.startswith("Q")} or weights
    return {
        "general.architecture": Value("str", gguf_names.ARCHITECTURE),
        "general.type": Value("str", "model"),
        "general.sampling.top_k": Value("i32", 64),
        "general.sampling.top_p": Value("f32", 0.95),
        "general.sampling.temp": Value("f32", 1.0),
        "general.name": Value("str", name),
        "general.size_label": Value("str", _size_label(storages)),
        "general.file_type": Value("u32", _FILE_TYPES[max(coded, key=lambda kind: coded[kind])]),
        "general.quantization_version": Value("u32", 2),
    }


def _size_label(storages: Mapping[str, Storage]) -> str:
    """`4.6B`, of a mixture `128x2.0B` (an expert and what all share): as the `gguf` package names sizes."""
    shared = experts = count = 0
    for storage in storages.values():
        for name, (_, shape) in storage.tensors.items():
            size = int(np.prod(shape, dtype=np.int64))
            if "_exps." in name and len(shape) == 3:
                experts, count = experts + size // shape[0], shape[0]
            else:
                shared += size
    parameters = shared + experts
    unit, size = next(((u, s) for u, s in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if parameters > s), ("K", 1e3))
    scaled = parameters / size
    return f"{count}x" * bool(count) + f"{scaled:.{0 if round(scaled) >= 10 else 1}f}{unit}"


@dataclasses.dataclass
class GgufRows:
    """A tensor of a GGUF file as float rows. Quantised ones are float32; `fits` are the grids that hold every block seen."""

    name: str
    path: Path
    placed: Placed
    shape: tuple[int, ...]
    fits: tuple[BlockGrid, ...]
    checked: bool = False
    declared: bool = False

    @property
    def coded(self) -> bool:
        """Whether the file has codes of it."""
        return self.placed.type.split is not None

    @property
    def dtype(self) -> str:
        """Of the values that `blocks` gives."""
        kind = self.placed.type
        return kind.name if kind.float_dtype is not None else "F32"

    @property
    def grid(self) -> BlockGrid | None:
        """The grid whose codes these are, whatever rule found their scales."""
        grids = self.placed.type.grids
        return (self.fits or grids)[0 if self.declared else -1] if grids else None

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values), and by the way strikes from `fits` the grids on which a block does not lie."""
        kind, width = self.placed.type, self.placed.shape[-1]
        for rows, raw in self._raw_blocks():
            if kind.float_dtype is not None:
                values = raw.reshape(-1).view(kind.float_dtype)
            else:
                values = kind.decode(raw.reshape(-1, kind.size))
            values = values.reshape(len(raw), *self.placed.shape[1:]) if len(self.placed.shape) > 1 else values
            if self.fits and not self.checked:
                blocks = values.reshape(-1, width)
                self.fits = tuple(grid for grid in self.fits if np.array_equal(encode(grid, blocks).values, blocks))
            yield rows, values
        self.checked = True

    def coded_blocks(self) -> Iterator[tuple[slice, Encoded]]:
        """(rows, codes and scales as the file has them)."""
        split = self.placed.type.split
        assert split is not None
        for rows, raw in self._raw_blocks():
            codes, scales = split(raw.reshape(-1, self.placed.type.size))
            shape = (len(raw), *self.placed.shape[1:])
            codes, scales = codes.reshape(shape), scales.reshape(*shape[:-1], -1)
            yield rows, Encoded(codes, scales, decode(codes, scales))

    def _raw_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their bytes); a vector counts as one row."""
        vector = len(self.placed.shape) == 1
        outer = 1 if vector else self.placed.shape[0]
        row = self.placed.size // outer
        # Codes take an eighth of their float32 values.
        step = max(1, (2 << 20) // row)
        for rows, raw in read_blocks(self.path, self.name, self.placed.start, (outer, row), np.dtype(np.uint8), step):
            yield (slice(0, self.placed.shape[0]) if vector else rows), raw


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A GGUF file that holds a Gemma 4: its config and its tensors by the names of `names.table`."""

    cfg: ModelConfig
    tensors: dict[str, GgufRows]
    metadata: Metadata
    declared: dict[str, BlockGrid]


def read_gguf(path: Path) -> GgufModel:
    """A file's header, checked against what its config asks for.

    Raises:
      UserError: no GGUF, another architecture, a type we do not read, tensors missing, unknown or misshaped.
    """
    metadata, placed = read_header(path)
    shapes = {name: tensor.shape for name, tensor in placed.items()}
    frequencies = placed.get(gguf_names.ROPE_FREQS)
    values = np.zeros(0, np.float32)
    if frequencies is not None:
        values = np.concatenate(
            [b for _, b in GgufRows("rope_freqs", path, frequencies, frequencies.shape, ()).blocks()]
        )
    cfg = gguf_names.config_of(metadata, shapes, values, str(path))
    wanted = gguf_names.expected(cfg)
    table = names.table(cfg)
    dead = {gguf_names.gguf_name(name) for name in names.dead(cfg)}
    got = {name: list(shape) for name, shape in shapes.items() if name not in dead}
    wrong = Mismatch.between(
        {target: list(table[name].shape) for target, name in wanted.items()}
        | {gguf_names.ROPE_FREQS: [cfg.global_head_dim // 2]},
        got,
    )
    if wrong:
        raise UserError(f"{path} does not hold the tensors its metadata asks for: {wrong}.")
    declared = _declared(metadata, cfg, path)
    tensors = {}
    for target, name in wanted.items():
        mine = declared.get(table[name].parameter)
        fits = placed[target].type.grids if mine is None else (mine,)
        tensors[name] = GgufRows(
            name, path, placed[target], table[name].shape, fits, mine is not None, mine is not None
        )
    return GgufModel(cfg, {name: tensors[name] for name in table}, metadata, declared)


def gguf_source(path: Path) -> Source:
    """A file to export from; one that does not name its grids is read once to find them."""
    model = read_gguf(path)
    for tensor in model.tensors.values():
        if tensor.fits and not tensor.checked:
            for _ in tensor.blocks():
                pass
    grids, _ = grids_found(model.tensors, model.cfg, str(path), as_stored=True)
    return Source(model.cfg, model.tensors, grids, str(path), (path,), trained=grids)


def load_gguf(
    path: Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings = default_device,
) -> Transformer:
    """The model of a file; `dtype` None: quantised weights as float32, which holds them exactly."""
    found = read_gguf(path)
    model = assemble(found.cfg, found.tensors, dtype=dtype, compute_dtype=compute_dtype, shardings=shardings)
    return on_grids(model, found.tensors, str(path), shardings)


def _declared(metadata: Metadata, cfg: ModelConfig, path: Path) -> dict[str, BlockGrid]:
    """What a file of ours says about its grids."""
    if GRIDS_KEY not in metadata:
        return {}
    parameters = {entry.parameter for entry in names.table(cfg).values()}
    try:
        found = {parameter: grid_named(name) for parameter, name in json.loads(metadata[GRIDS_KEY].value).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged: its key {GRIDS_KEY} cannot be read ({error}).") from error
    if not found.keys() <= parameters:
        raise UserError(f"{path} is damaged: its key {GRIDS_KEY} names parameters that the model does not have.")
    return found

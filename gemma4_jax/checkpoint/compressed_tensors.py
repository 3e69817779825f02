"""compressed-tensors, pack-quantized: what vLLM and transformers load as W4A16 (and W8A16), written from codes and read back.

A linear layer is `weight_packed` int32 [out, in * bits / 32], `weight_scale` [out, blocks] and `weight_shape` int64 [2]; everything
else stays float. Source: compressed-tensors 0.20, compressors/pack_quantized.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from gemma4_jax.checkpoint import bits as packing
from gemma4_jax.checkpoint.export import Outcome, Storage
from gemma4_jax.checkpoint.hf_export import file_name, plain, write_directory
from gemma4_jax.checkpoint.lattice import Encoded, decode, encode
from gemma4_jax.checkpoint.patterns import layer_patterns
from gemma4_jax.checkpoint.safetensors_io import Tensor, read_blocks
from gemma4_jax.checkpoint.source import CODES, Source
from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import INT2_CHANNEL, INT4_CHANNEL, INT4_SYM7_G32, INT8_CHANNEL, Q4_0, Q4_0_BF16, BlockGrid

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_TOWER_PATTERNS = ["re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*", "re:.*embed_audio.*"]
Experts = Literal["float", "packed"]


def write_compressed_tensors(
    source: Source, path: Path, *, dtype: str = "bfloat16", experts: Experts = "float", **frame: Any
) -> Outcome:
    """Writes a directory.

    Args:
      source: linear layers on a grid are packed; the other weights are written as `dtype`, as their grid rounds them.
      path: new or empty directory.
      dtype: of scales and of what is not packed.
      experts: "float": stacked, as transformers loads them; "packed": one quantised linear layer per expert and projection
        (`experts.7.gate_proj.weight_packed`), as vLLM loads them and transformers does not.
      frame: see `hf_export.write_directory`.

    Raises:
      UserError: no linear layer is on a grid; see `export.write`.
    """
    packed = {name: _is_packed(source, name, experts) for name in source.tensors}
    if not any(packed.values()):
        raise UserError(
            f"{source.origin} has no linear layer on a grid, so nothing would be quantised; train with a policy (w4a16), or set "
            "export.policy to round the weights as they are."
        )
    storages, extras = {}, {}
    for name, wanted in packed.items():
        if not wanted:
            storages[name] = plain(source, name, dtype)
        elif source.kind(name) == "experts":
            storages[name] = _expert_storage(source, name, dtype, extras)
        else:
            storages[name] = _linear_storage(source, name, dtype, extras)
    config = _quantization_config(source, packed)
    return write_directory(source, path, storages, dtype=dtype, quantization=config, extras=extras, **frame)


def _is_packed(source: Source, name: str, experts: Experts) -> bool:
    kinds = ("linear", "experts") if experts == "packed" else ("linear",)
    return source.grid(name) is not None and source.kind(name) in kinds


def _linear_storage(source: Source, name: str, dtype: str, extras: dict[str, np.ndarray]) -> Storage:
    grid, shape = source.grid(name), source.tensors[name].shape
    assert grid is not None
    module = file_name(source, name).removesuffix(".weight")
    tensors = _forms(module, grid, shape, dtype)
    extras[f"{module}.weight_shape"] = np.array(shape, np.int64)

    def pack(_: slice, encoded: Encoded) -> Iterable[tuple[str, np.ndarray]]:
        yield f"{module}.weight_packed", packing.pack(encoded.codes, grid.code_bits)
        yield f"{module}.weight_scale", encoded.scales.astype(_dtype(dtype))

    return Storage(f"int{grid.code_bits}", tensors, pack, grid, _held(dtype))


def _expert_storage(source: Source, name: str, dtype: str, extras: dict[str, np.ndarray]) -> Storage:
    """One stacked tensor of experts as a linear layer per expert and projection."""
    grid, (count, rows, width) = source.grid(name), source.tensors[name].shape
    assert grid is not None
    base = file_name(source, name)
    home, last = base.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    each = rows // len(parts)
    tensors = {}
    for expert in range(count):
        for part in parts:
            module = f"{home}.{expert}.{part}"
            tensors |= _forms(module, grid, (each, width), dtype)
            extras[f"{module}.weight_shape"] = np.array([each, width], np.int64)

    def pack(blocks: slice, encoded: Encoded) -> Iterable[tuple[str, np.ndarray]]:
        for at, expert in enumerate(range(blocks.start, blocks.stop)):
            for number, part in enumerate(parts):
                own = slice(number * each, (number + 1) * each)
                module = f"{home}.{expert}.{part}"
                yield f"{module}.weight_packed", packing.pack(encoded.codes[at, own], grid.code_bits)
                yield f"{module}.weight_scale", encoded.scales[at, own].astype(_dtype(dtype))

    return Storage(f"int{grid.code_bits}", tensors, pack, grid, _held(dtype))


def _forms(module: str, grid: BlockGrid, shape: Sequence[int], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows, width = shape
    words, left = divmod(width * grid.code_bits, 32)
    if left:
        raise UserError(
            f"{module} is {width} wide, which is not a whole number of int32 words of {grid.code_bits}-bit codes."
        )
    return {
        f"{module}.weight_packed": ("I32", (rows, words)),
        f"{module}.weight_scale": (CODES[_dtype(dtype)], (rows, width // (grid.block or width))),
    }


def _held(dtype: str):
    """What is read back: scales in the file's dtype."""

    def held(encoded: Encoded) -> np.ndarray:
        return decode(encoded.codes, encoded.scales.astype(_dtype(dtype)))

    return held


def _quantization_config(source: Source, packed: Mapping[str, bool]) -> dict[str, Any]:
    """config.json's quantization_config: one group per grid, and what is left float among the linear layers."""
    grids = {name: source.grid(name) for name, wanted in packed.items() if wanted}
    linear = [name for name in packed if source.kind(name) in ("linear", "experts")]
    kinds = list(dict.fromkeys(grid for grid in grids.values() if grid is not None))
    groups = {}
    for number, grid in enumerate(kinds):
        mine = [name for name, other in grids.items() if other == grid]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else _patterns(mine, linear),
            "weights": {
                "num_bits": grid.code_bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if grid.block else "channel",
                "group_size": grid.block,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    left = [name for name in linear if name not in grids]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *_TOWER_PATTERNS, *_patterns(left, linear)],
        "kv_cache_scheme": None,
    }


def _patterns(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """Modules as compressed-tensors writes patterns, which must match from the start."""
    return [f"re:.*{pattern}" for pattern in layer_patterns(chosen, every)]


@dataclasses.dataclass
class PackedRows:
    """A packed weight of a directory as float32 rows; `fits` are the grids that hold every block seen.

    packed uint8 words and scales of the same rows; experts are several of them stacked: `parts[expert]` gives the layers whose
    rows make one expert.
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Sequence[tuple[Tensor, Tensor]]]
    bits: int
    group: int | None
    fits: tuple[BlockGrid, ...]
    checked: bool = False
    declared: BlockGrid | None = None
    dtype: str = "F32"
    coded: bool = True

    @property
    def grid(self) -> BlockGrid | None:
        """The grid whose codes these are, whatever rule found their scales."""
        if self.group:
            return (self.declared or Q4_0) if (self.bits, self.group) == (4, 32) else None
        return {2: INT2_CHANNEL, 4: INT4_CHANNEL, 8: INT8_CHANNEL}[self.bits]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values); by the way strikes from `fits` the grids on which a block does not lie."""
        for rows, encoded in self.coded_blocks():
            yield rows, encoded.values
        self.checked = True

    def coded_blocks(self) -> Iterator[tuple[slice, Encoded]]:
        """(rows, codes and scales as the file has them)."""
        if len(self.shape) == 3:
            for expert, layers in enumerate(self.parts):
                found = [encoded for layer in layers for _, encoded in self._layer(*layer)]
                stacked = (
                    np.concatenate([getattr(e, key) for e in found])[None] for key in ("codes", "scales", "values")
                )
                yield slice(expert, expert + 1), Encoded(*stacked)
        else:
            yield from self._layer(*self.parts[0][0])

    def _layer(self, packed: Tensor, scale: Tensor) -> Iterator[tuple[slice, Encoded]]:
        scales, width = scale.values().astype(np.float32), self.shape[-1]
        row = packed.shape[1] * 4
        raw_rows = read_blocks(
            packed.file, packed.name, packed.start, (packed.shape[0], row), np.dtype(np.uint8), _step(row)
        )
        for rows, raw in raw_rows:
            codes = packing.unpack(raw, self.bits)[:, :width]
            values = decode(codes, scales[rows])
            if self.fits and not self.checked:
                self.fits = tuple(grid for grid in self.fits if np.array_equal(encode(grid, values).values, values))
            yield rows, Encoded(codes, scales[rows], values)


def candidates(bits: int, group: int | None) -> tuple[BlockGrid, ...]:
    """Our grids that such codes may lie on and that find codes and scales again from the values."""
    if (bits, group) == (4, 32):
        return (INT4_SYM7_G32, Q4_0_BF16, Q4_0)
    return (INT8_CHANNEL,) if (bits, group) == (8, None) else ()


def packed_tensors(
    stored: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The tensors of a compressed-tensors directory, with `PackedRows` in place of packed parts; others as they are.

    Args:
      stored: every tensor of the directory by its name there.
      config: quantization_config.
      wanted: name there -> shape, of every tensor of the model.
      where: for complaints.

    Raises:
      UserError: another format of compressed-tensors, asymmetric or reordered weights, a part missing.
    """
    groups = config.get("config_groups") or {}
    formats = {config.get("format"), *(group.get("format") for group in groups.values())} - {None}
    if formats != {FORMAT}:
        raise UserError(
            f"{where} is compressed-tensors in the format {sorted(formats) or None}; this version reads {FORMAT!r}."
        )
    foreign = (".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
    unread = sorted(name for name in stored if name.endswith(foreign))
    if unread:
        raise UserError(
            f"{where} has {len(unread)} tensors like {unread[0]}; this version reads symmetric weights in order only."
        )
    found, used = {}, set()
    for name, shape in wanted.items():
        modules = _modules(name, shape)
        parts = [f"{module}.{part}" for row in modules for module in row for part in ("weight_packed", "weight_scale")]
        missing = [tensor for tensor in parts if tensor not in stored]
        if name in stored or len(missing) == len(parts):
            continue  # the caller says which tensors are missing altogether
        if missing:
            raise UserError(f"{where} lacks {missing[0]}, a part of the packed weight {name}.")
        pairs = [[(stored[f"{m}.weight_packed"], stored[f"{m}.weight_scale"]) for m in row] for row in modules]
        found[name] = _checked_rows(name, shape, pairs, where)
        used |= {*parts, *(f"{module}.weight_shape" for row in modules for module in row)}
    if not found:
        raise UserError(f"{where} says it is quantised, but no tensor of the model is packed in it.")
    return found | {name: tensor for name, tensor in stored.items() if name not in used}


def _modules(name: str, shape: tuple[int, ...]) -> list[list[str]]:
    """The linear layers that a tensor may be packed as: [[module]], of experts one row per expert."""
    if len(shape) < 3 or ".experts." not in name:
        return [[name.removesuffix(".weight")]]
    home, last = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return [[f"{home}.{expert}.{part}" for part in parts] for expert in range(shape[0])]


def _checked_rows(
    name: str, shape: tuple[int, ...], parts: Sequence[Sequence[tuple[Tensor, Tensor]]], where: str
) -> PackedRows:
    packed, scale = parts[0][0]
    width, rows = shape[-1], shape[-2] // len(parts[0])
    bits = packed.shape[1] * 32 // width if len(packed.shape) == 2 else 0
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    for one, other in (pair for row in parts for pair in row):
        good = one.dtype == "I32" and one.shape == (rows, packed.shape[1]) and other.shape == (rows, groups)
        if (
            not good
            or bits not in (2, 4, 8)
            or not groups
            or width % groups
            or other.dtype not in ("F32", "F16", "BF16")
        ):
            raise UserError(
                f"{where} holds {one.name} as {one.dtype}{list(one.shape)} with scales {other.dtype}{list(other.shape)}, which are "
                f"no 2, 4 or 8-bit codes of {[rows, width]}."
            )
    # One group of 32 is a channel too, if it is 32 wide: 8-bit codes are never grouped by us or by vLLM.
    group = None if groups == 1 and (width != 32 or bits == 8) else width // groups
    return PackedRows(name, shape, parts, bits, group, candidates(bits, group))


def _step(row: int) -> int:
    return max(1, (2 << 20) // row)


def _dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)

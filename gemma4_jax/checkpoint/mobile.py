"""The mobile format of E2B and E4B (quant_method "gemma"): 2, 4 and 8-bit codes with a scale per output channel.

A linear layer is `weight` (uint8: 2 or 4-bit codes, the first in the lowest bits, code + 2^(bits - 1); int8 as it is) and
`weight_scale` float32 [out, 1], an embedding `embedding_quantized` and `embedding_scale` [V, blocks]. Scales of activations are
`input_activation_scale`, `output_activation_scale`, `k_cache_scale`, `v_cache_scale`. The head, tied to the embedding, is stored
again. transformers 5.23 computes with the block scales that published tables of per-layer embeddings have, but declares one scale
per row and so refuses to load them. Source: transformers 5.23, integrations/gemma_quant.py and quantizers/quantizer_gemma.py.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.checkpoint import bits as packing
from gemma4_jax.checkpoint.export import Outcome, Storage
from gemma4_jax.checkpoint.hf_export import file_name, plain, write_directory
from gemma4_jax.checkpoint.lattice import Encoded, decode, encode
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.names import TOWERS
from gemma4_jax.checkpoint.patterns import layer_patterns
from gemma4_jax.checkpoint.safetensors_io import Tensor, read_blocks
from gemma4_jax.checkpoint.source import Source
from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import INT2_CHANNEL, INT4_CHANNEL, INT8_CHANNEL, BlockGrid, int4_blocks

METHOD = "gemma"
HEAD = "lm_head"
ACTIVATION_SCALES = ("input_activation_scale", "output_activation_scale", "k_cache_scale", "v_cache_scale")
_STORED = {2: "U8", 4: "U8", 8: "I8"}


def write_mobile(
    source: Source,
    path: Path,
    *,
    dtype: str = "bfloat16",
    **frame: Any,
) -> Outcome:
    """Writes a directory.

    Args:
      source: linear layers and tables on a channel or wide-block grid are packed, the rest is `dtype`; static scales of
        activations and of the cache go along.
      path: new or empty directory.
      dtype: of what is not packed.
      frame: see `hf_export.write_directory`.

    Raises:
      UserError: a model that is not of the E series, a grid that the format does not hold, an activation that was never calibrated.
    """
    if not source.cfg.hidden_size_per_layer_input:
        raise UserError(
            "The mobile format is one of E2B and E4B; this model has no per-layer embeddings. Export another format."
        )
    activations = _activations(source)
    storages, codes = {}, {}
    for name in source.tensors:
        grid = source.grid(name)
        if grid is None:
            storages[name] = plain(source, name, dtype)
            continue
        _check_grid(source, name, grid)
        codes[name] = grid
        make = _table_storage if source.kind(name) == "table" else _linear_storage
        storages[name] = make(source, name, grid)
    if not codes:
        raise UserError(
            f"{source.origin} has no weight on a grid, so nothing would be quantised; train with policy mobile, or set "
            "export.policy to round the weights as they are."
        )
    # 0: not rounded. transformers wants both scales of every packed layer.
    wanted = [f"{module}.{scale}" for module in _packed_layers(source, codes) for scale in ACTIVATION_SCALES[:2]]
    extras = {name: np.zeros((), np.float32) for name in wanted}
    extras |= activations
    config = _quantization_config(source, codes)
    tied = "embed_tokens.weight" not in codes
    return write_directory(
        *(source, path, storages),
        **{
            "dtype": dtype,
            "quantization": config,
            "extras": extras,
            "config_changes": {"tie_word_embeddings": tied},
            **frame,
        },
    )


def _activations(source: Source) -> dict[str, np.ndarray]:
    """The scales of activations by their names in the file.

    Raises:
      UserError: one of them was never calibrated.
    """
    modules: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name in source.tensors:
        entry = source.entry(name)
        layer = file_name(source, name).removesuffix(".weight")
        modules.setdefault(entry.parameter.removesuffix(".w"), []).append((layer, entry.index))
        if name.endswith("self_attn.k_proj.weight"):  # the module that keeps keys and values
            modules.setdefault(entry.parameter.removesuffix(".k.w"), []).append((layer.rpartition(".")[0], entry.index))
    found = {}
    for name, (kind, values) in source.activation_scales().items():
        stored = kind if kind.endswith("cache_scale") else kind.replace("_scale", "_activation_scale")
        for layer, index in modules.get(name.rpartition(".")[0], []):
            found[f"{layer}.{stored}"] = np.asarray(values[index], np.float32).reshape(())
    unset = [name for name, scale in found.items() if not scale > 0]
    if unset:
        raise UserError(
            f"{source.origin} rounds activations, but {len(unset)} of their scales were never calibrated ({listed(unset)}); run "
            "the calibration first."
        )
    return found


def _packed_layers(source: Source, codes: Mapping[str, BlockGrid]) -> list[str]:
    """The linear layers, the head among them, that are packed."""
    layers = [file_name(source, name).removesuffix(".weight") for name in codes if source.kind(name) == "linear"]
    return [*layers, *([HEAD] if "embed_tokens.weight" in codes else [])]


def _check_grid(source: Source, name: str, grid: BlockGrid) -> None:
    """UserError unless the format has a place for the grid's codes and scales."""
    table = source.kind(name) == "table"
    fits = grid.scale_bits == 32 and (grid.block is None or table)
    if not fits or source.kind(name) not in ("linear", "table"):
        raise UserError(
            f"{name} is on {grid.name}, which the mobile format does not hold: it has a float32 scale for every output channel. "
            "Export another format, or train with policy mobile."
        )


def _linear_storage(source: Source, name: str, grid: BlockGrid) -> Storage:
    module, (rows, width) = file_name(source, name).removesuffix(".weight"), source.tensors[name].shape
    tensors = {
        f"{module}.weight": (_STORED[grid.code_bits], (rows, width * grid.code_bits // 8)),
        f"{module}.weight_scale": ("F32", (rows, 1)),
    }

    def pack(_: slice, encoded: Encoded) -> Iterable[tuple[str, np.ndarray]]:
        yield f"{module}.weight", _packed(encoded.codes, grid.code_bits)
        yield f"{module}.weight_scale", encoded.scales

    return Storage(f"int{grid.code_bits}", tensors, pack, grid)


def _table_storage(source: Source, name: str, grid: BlockGrid) -> Storage:
    """An embedding; the token embedding is written a second time as the head."""
    module, (rows, width) = file_name(source, name).removesuffix(".weight"), source.tensors[name].shape
    packed = (_STORED[grid.code_bits], (rows, width * grid.code_bits // 8))
    scales = ("F32", (rows, width // (grid.block or width)))
    tensors = {f"{module}.embedding_quantized": packed, f"{module}.embedding_scale": scales}
    is_head = name == "embed_tokens.weight"
    if is_head:
        tensors |= {f"{HEAD}.weight": packed, f"{HEAD}.weight_scale": scales}
        if scales[1][1] != 1:
            raise UserError(f"{name} is on {grid.name}; the head, which is tied to it, wants one scale for a row.")

    def pack(_: slice, encoded: Encoded) -> Iterable[tuple[str, np.ndarray]]:
        raw = _packed(encoded.codes, grid.code_bits)
        yield f"{module}.embedding_quantized", raw
        yield f"{module}.embedding_scale", encoded.scales
        if is_head:
            yield f"{HEAD}.weight", raw
            yield f"{HEAD}.weight_scale", encoded.scales

    return Storage(f"int{grid.code_bits}", tensors, pack, grid)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes if bits == 8 else packing.pack(codes, bits)


def _quantization_config(source: Source, codes: Mapping[str, BlockGrid]) -> dict[str, Any]:
    """config.json's quantization_config: the bits of every module by pattern, and the modules that stay float."""
    weights = [name for name in source.tensors if source.kind(name) in ("linear", "table")]
    configs: dict[str, dict[str, int]] = {}
    for bits in sorted({grid.code_bits for grid in codes.values()}):
        mine = [name for name, grid in codes.items() if grid.code_bits == bits]
        configs |= {pattern: {"num_bits": bits} for pattern in layer_patterns(mine, weights)}
    head = codes.get("embed_tokens.weight")
    if head is not None:
        configs[f"{HEAD}$"] = {"num_bits": head.code_bits}
    tables = [name for name in weights if source.kind(name) == "table"]
    float_names = [file_name(source, name).removesuffix(".weight") for name in weights if name not in codes]
    towers = [prefix.removesuffix(".") for prefix in TOWERS] if source.cfg.is_multimodal else []
    return {
        "quant_method": METHOD,
        "num_bits": 4,
        "quantize_embeddings": any(name in codes for name in tables),
        "module_quant_configs": configs,
        "modules_to_not_convert": [*float_names, *([] if head else [HEAD]), *towers],
    }


@dataclasses.dataclass
class MobileRows:
    """A packed weight of a directory as float32 rows; `fits` are the grids that hold every block seen."""

    name: str
    shape: tuple[int, ...]
    packed: Tensor
    scale: Tensor
    bits: int
    fits: tuple[BlockGrid, ...]
    checked: bool = False
    declared: BlockGrid | None = None
    dtype: str = "F32"
    coded: bool = True

    @property
    def grid(self) -> BlockGrid:
        """The grid whose codes these are, whatever rule found their scales."""
        blocks = self.scale.shape[1]
        if blocks > 1:
            return int4_blocks(self.shape[-1] // blocks)
        return {2: INT2_CHANNEL, 4: INT4_CHANNEL, 8: INT8_CHANNEL}[self.bits]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values); by the way strikes from `fits` the grids on which a block does not lie."""
        for rows, encoded in self.coded_blocks():
            if self.fits and not self.checked:
                values = encoded.values
                self.fits = tuple(grid for grid in self.fits if np.array_equal(encode(grid, values).values, values))
            yield rows, encoded.values
        self.checked = True

    def coded_blocks(self) -> Iterator[tuple[slice, Encoded]]:
        """(rows, codes and scales as the file has them)."""
        scales, dtype = self.scale.values(), np.dtype(np.int8 if self.bits == 8 else np.uint8)
        step = max(1, (2 << 20) // self.packed.shape[1])
        for rows, raw in read_blocks(
            self.packed.file, self.packed.name, self.packed.start, self.packed.shape, dtype, step
        ):
            codes = raw.copy() if self.bits == 8 else packing.unpack(raw, self.bits)
            yield rows, Encoded(codes, scales[rows], decode(codes, scales[rows]))


def packed_tensors(
    stored: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The tensors of a mobile directory, with `MobileRows` in place of packed parts; scales of activations and the head left out.

    Raises:
      UserError: a part missing or misshaped, a head that is not the embedding, audio tables of residual codes.
    """
    residual = sorted(name for name in stored if "rqv2" in name)
    if residual:
        raise UserError(
            f"{where} has residual codes of an audio tower ({residual[0]}), which this version does not read."
        )
    found: dict[str, Any] = {}
    used = {name for name in stored if name.endswith(ACTIVATION_SCALES)}
    for name, shape in wanted.items():
        module = name.removesuffix(".weight")
        for packed, scale in (("weight", "weight_scale"), ("embedding_quantized", "embedding_scale")):
            if f"{module}.{scale}" in stored and f"{module}.{packed}" in stored:
                pair = stored[f"{module}.{packed}"], stored[f"{module}.{scale}"]
                found[name] = _checked_rows(name, shape, *pair, where)
                used |= {pair[0].name, pair[1].name}
    if not found:
        raise UserError(f"{where} says it is quantised, but no tensor of the model is packed in it.")
    head = [stored.get(f"{HEAD}.{part}") for part in ("weight", "weight_scale")]
    embed = next((rows for name, rows in found.items() if name.endswith(".embed_tokens.weight")), None)
    if all(head) and embed is not None:
        _refuse_untied(head, (embed.packed, embed.scale), where)
        used |= {f"{HEAD}.weight", f"{HEAD}.weight_scale"}
    return found | {name: tensor for name, tensor in stored.items() if name not in used}


def activation_scales(stored: Mapping[str, Tensor]) -> dict[str, float]:
    """The scales of activations that a directory has, by their names there."""
    return {name: float(t.values().reshape(())) for name, t in stored.items() if name.endswith(ACTIVATION_SCALES)}


def _checked_rows(name: str, shape: tuple[int, ...], packed: Tensor, scale: Tensor, where: str) -> MobileRows:
    rows, width = shape
    bits = 8 * packed.shape[-1] // width
    good = packed.shape == (rows, width * bits // 8) and packed.dtype == _STORED.get(bits)
    blocks = scale.shape[-1] if len(scale.shape) == 2 else 0
    if (
        not good
        or scale.dtype != "F32"
        or not blocks
        or scale.shape[0] != rows
        or width % blocks
        or (blocks > 1 and bits != 4)
    ):
        raise UserError(
            f"{where} holds {packed.name} as {packed.dtype}{list(packed.shape)} with scales {scale.dtype}{list(scale.shape)}, "
            f"which are no 2, 4 or 8-bit codes of {list(shape)}."
        )
    return MobileRows(name, shape, packed, scale, bits, (INT8_CHANNEL,) if bits == 8 else ())


def _refuse_untied(head: Sequence[Any], embed: Sequence[Tensor], where: str) -> None:
    """UserError unless the stored head is the embedding."""
    for one, other in zip(head, embed, strict=True):
        same = (one.shape, one.dtype) == (other.shape, other.dtype)
        if same:
            raw = [read_blocks(t.file, t.name, t.start, _bytes_shape(t), np.dtype(np.uint8)) for t in (one, other)]
            same = all(np.array_equal(a, b) for (_, a), (_, b) in zip(*raw, strict=True))
        if not same:
            raise UserError(f"{where} stores {one.name} with other values than {other.name}; Gemma 4's head is tied.")


def _bytes_shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1] * (4 if tensor.dtype == "F32" else 1)

"""Hugging Face directories streamed from a source: float weights, and the frame that the quantised formats share."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.canvas import beside
from gemma4_jax.checkpoint.export import Outcome, Storage, float_storage, write
from gemma4_jax.checkpoint.hf import STOP_IDS, generation_config, parse_size, write_json
from gemma4_jax.checkpoint.manifest import FILE, Manifest, text_of
from gemma4_jax.checkpoint.safetensors_io import BITS, FLOATS, lay_out
from gemma4_jax.checkpoint.shards import INDEX, SINGLE
from gemma4_jax.checkpoint.source import CODES, Source
from gemma4_jax.config import ModelConfig

Forms = Mapping[str, tuple[str, tuple[int, ...]]]


def write_hf(
    source: Source,
    path: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    spelling: Literal["new", "old"] = "new",
    stop_ids: Sequence[int] = STOP_IDS,
    extra_files: Iterable[Path] = (),
    requantise: bool = False,
    manifest: Manifest | None = None,
) -> Outcome:
    """Float weights of one dtype, each as its grid rounds it: on the lattice exactly, or an error that counts what is not.

    int4_sym7_g32, q4_0_bf16 and the channel grids are exact in bfloat16, q4_0 and q8_0 in float32 only.
    """
    storages = {name: plain(source, name, dtype) for name in source.tensors}
    return write_directory(
        source,
        path,
        storages,
        dtype=dtype,
        max_shard_size=max_shard_size,
        spelling=spelling,
        stop_ids=stop_ids,
        extra_files=extra_files,
        requantise=requantise,
        manifest=manifest,
    )


def plain(source: Source, name: str, dtype: str) -> Storage:
    """One tensor as numbers of `dtype` ("bfloat16", ...)."""
    kind = np.dtype(dtype) if dtype != "bfloat16" else FLOATS["BF16"]
    return float_storage(file_name(source, name), CODES[kind], kind, source.tensors[name].shape, dtype)


def file_name(source: Source, name: str) -> str:
    """A tensor's name in the directory."""
    return names.in_file(name, prefix_of(source.cfg))


def prefix_of(cfg: ModelConfig) -> str:
    """What the text model's tensors begin with."""
    return names.MULTIMODAL_PREFIX if cfg.is_multimodal else names.TEXT_PREFIX


def write_directory(
    source: Source,
    path: Path,
    storages: Mapping[str, Storage],
    *,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    spelling: Literal["new", "old"] = "new",
    stop_ids: Sequence[int] = STOP_IDS,
    extra_files: Iterable[Path] = (),
    requantise: bool = False,
    manifest: Manifest | None = None,
) -> Outcome:
    """A directory with these tensors, config.json (with `quantization` as its quantization_config) and what else belongs to it.

    Written beside `path` and renamed: `path` is complete or absent.
    """
    limit = parse_size(max_shard_size)
    shards = _shards(storages, extras or {}, limit)
    config = source.cfg.to_hf(dtype=dtype, spelling=spelling) | dict(config_changes or {})
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    with beside(path, what="The directory") as partial:
        partial.mkdir()
        files, weight_map, total = {}, {}, 0
        for number, forms in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            front, places = lay_out(forms)
            files[file] = (partial / file, front, places)
            weight_map |= dict.fromkeys(forms, file)
            total += sum(size for _, size in places.values())
        outcome = write(source, storages, files, requantise=requantise, extras=extras)
        if len(shards) > 1:
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation_config(source.cfg, stop_ids))
        if manifest is not None:
            (partial / FILE).write_text(text_of(manifest(outcome)), encoding="utf-8")
        for extra in extra_files:
            shutil.copy(extra, partial)
    return outcome


def _shards(storages: Mapping[str, Storage], extras: Mapping[str, np.ndarray], limit: int) -> list[Forms]:
    """The tensors of each file, in order, at most `limit` bytes each; those of one weight stay together."""
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [dict(storage.tensors) for storage in storages.values()]
    groups += [{name: (kinds[values.dtype], values.shape)} for name, values in extras.items()]
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = limit
    for group in groups:
        size = sum(int(np.prod(shape, dtype=np.int64)) * BITS[kind] // 8 for kind, shape in group.values())
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1] |= group
        room -= size
    return list(shards)

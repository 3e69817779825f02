"""Hugging Face safetensors directories to our model and back, one block of rows beyond the model itself in memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.mismatch import Mismatch
from gemma4_jax.checkpoint.names import Entry
from gemma4_jax.checkpoint.placement import Shardings, default_device, dtype_name
from gemma4_jax.checkpoint.safetensors_io import FLOATS, Tensor, copy, write
from gemma4_jax.checkpoint.shards import INDEX, SINGLE, read_json, tensors_of
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant.policy import grid_names, snap

C = TypeVar("C")

STOP_IDS = (1, 106, 50)
"""<eos>, <turn|> and <|tool_response>: what the released generation_config.json files stop at."""


def load_hf(
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    shardings: Shardings = default_device,
) -> Transformer:
    """The model of a Hugging Face directory; both name layouts, single file or sharded.

    Args:
      path: directory with config.json and safetensors.
      dtype: of the parameters; None: as stored, each parameter in the widest dtype of its tensors.
      compute_dtype: what layers compute in; None: `dtype`, or the embedding's.
      text_only: leave out the vision and audio towers, without reading their tensors' bytes.
      shardings: where each parameter goes. One parameter at a time is on the host; on one CPU it stays where it was read.

    Raises:
      UserError: anything wrong with the directory, in one sentence with the names.
    """
    cfg, stored = stored_tensors(path, text_only)
    return assemble(cfg, stored, dtype=dtype, compute_dtype=compute_dtype, shardings=shardings)


def stored_tensors(path: str | Path, text_only: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of a directory without quantisation and its text tensors by the names of `names.table`; see `load_hf`."""
    directory = checkpoint_directory(path)
    cfg = read_config(directory).text_only() if text_only else read_config(directory)
    return cfg, text_tensors(directory, cfg, tensors_of(directory), text_only)


def assemble(
    cfg: ModelConfig,
    stored: Mapping[str, Any],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings = default_device,
) -> Transformer:
    """The model made of tensors that are read by blocks of rows (`source.Rows`, by the names of `names.table`)."""
    dtype, compute_dtype = dtype_name(dtype), dtype_name(compute_dtype)
    pieces = pieces_of(cfg, stored)
    dtypes = {parameter: parameter_dtype(parts, dtype) for parameter, parts in pieces.items()}
    compute_dtype = compute_dtype or dtype or dtypes["embed.w"].name

    def read(parameter: str, variable: nnx.Variable) -> jax.Array:
        host = _aligned(variable.get_value().shape, dtypes[parameter])
        for entry, tensor in pieces[parameter]:
            target = np.atleast_1d(entry.view(host[(*entry.index, ...)]))
            for rows, block in tensor.blocks():
                copy(target[rows], block)
        sharding = shardings(parameter, variable)
        if sharding.is_fully_addressable:
            return jax.device_put(host, sharding)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return map_arrays(read, abstract(cfg, dtype or "float32", compute_dtype=compute_dtype))


def pieces_of(cfg: ModelConfig, stored: Mapping[str, Any]) -> dict[str, list[tuple[Entry, Any]]]:
    """Parameter -> the tensors it is made of, each with its place."""
    pieces: dict[str, list[tuple[Entry, Any]]] = {}
    for name, entry in names.table(cfg).items():
        pieces.setdefault(entry.parameter, []).append((entry, stored[name]))
    return pieces


def save_hf(
    model: Transformer,
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike = "bfloat16",
    max_shard_size: str | int = "5GB",
    spelling: Literal["new", "old"] = "new",
    stop_ids: Sequence[int] = STOP_IDS,
    extra_files: Iterable[str | Path] = (),
) -> Path:
    """Writes a `Gemma4ForConditionalGeneration` directory, or a text-only `Gemma4ForCausalLM` one for a model without towers.

    A model trained on a grid is written as the grid rounds it.

    Everything goes into a directory beside `path` that is renamed at the end, so `path` is complete or absent.

    Args:
      model: the model to write.
      path: new or empty directory.
      dtype: float32, bfloat16 or float16.
      max_shard_size: bytes, or "5GB", "500MB"; one file if everything fits, else shards with an index.
      spelling: of config.json, "new" or "old" (`ModelConfig.to_hf`).
      stop_ids: token ids in generation_config.json at which generation ends; those outside the vocabulary are left out.
      extra_files: files to copy into the directory (tokenizer, chat template).

    Returns:
      The directory.

    Raises:
      UserError: `path` holds something, dtype or size is not understood, or the disk refused.
    """
    name = dtype_name(dtype)
    code = next(code for code, values in FLOATS.items() if values.name == name)
    limit = parse_size(max_shard_size)
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty directory; choose another one or remove it.")
    model = snap(model) if grid_names(model) else model
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(model, partial, code, limit)
        write_json(partial / "config.json", model.cfg.to_hf(dtype=FLOATS[code].name, spelling=spelling))
        write_json(partial / "generation_config.json", generation_config(model.cfg, stop_ids))
        for file in extra_files:
            shutil.copy(file, partial)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def generation_config(cfg: ModelConfig, stop_ids: Sequence[int] = STOP_IDS) -> dict[str, Any]:
    """generation_config.json: where to stop, and the sampling defaults published with the models."""
    return {
        "bos_token_id": cfg.bos_token_id,
        "pad_token_id": cfg.pad_token_id,
        "eos_token_id": [token for token in stop_ids if token < cfg.vocab_size],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def parse_size(size: str | int) -> int:
    """Bytes of "5GB" (10^9), "500MB", "10KB" or a number."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    text = str(size).strip().upper()
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        value = int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise UserError(f"max_shard_size {size!r} is not a size; wanted bytes or something like '5GB' or '500MB'.")
    return value


def checkpoint_directory(path: str | Path) -> Path:
    """`path` as a directory with something in it."""
    directory = Path(path)
    if not directory.exists():
        raise UserError(f"The checkpoint directory {str(directory)!r} does not exist.")
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r} is a file; wanted the checkpoint's directory.")
    if not any(directory.iterdir()):
        raise UserError(f"The checkpoint directory {str(directory)!r} is empty.")
    return directory


def read_config(directory: Path) -> ModelConfig:
    """The model that the directory's config.json describes."""
    return described(directory, ModelConfig.from_hf, "Gemma 4 model")


def described(directory: Path, build: Callable[[dict[str, Any]], C], what: str) -> C:
    """What `build` makes of the directory's config.json; UserError where it describes no such thing."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory} has no config.json; wanted the Hugging Face directory of a {what}.")
    try:
        return build(read_json(path))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    except (TypeError, KeyError, AttributeError, ArithmeticError, ValueError) as error:
        raise UserError(f"{path} describes no {what} ({type(error).__name__}: {error}).") from error


def text_tensors(directory: Path, cfg: ModelConfig, stored: dict[str, Tensor], text_only: bool) -> dict[str, Tensor]:
    """The model's tensors by the names of the table: exactly those of the table, in the right shapes; towers unless `text_only`."""
    towers = [name for name in stored if name.startswith(names.TOWERS)] if text_only else []
    whole = any(name.startswith(names.MULTIMODAL_PREFIX) for name in stored)
    prefix = names.MULTIMODAL_PREFIX if whole else names.TEXT_PREFIX
    ignored = {*towers, names.HEAD, *(prefix + name for name in names.dead(cfg))}
    wanted = {names.in_file(name, prefix): list(entry.shape) for name, entry in names.table(cfg).items()}
    got = {name: list(tensor.shape) for name, tensor in stored.items() if name not in ignored}
    wrong = Mismatch.between(wanted, got)
    if wrong:
        hint = " Is this config.json of another variant?" if wrong.misshaped else ""
        if any(name.startswith(names.TOWERS) for name in wrong.missing):
            hint = " Its towers are not there: pass text_only=True to load the text model alone."
        raise UserError(f"{directory} does not hold the tensors its config.json asks for: {wrong}.{hint}")
    if names.HEAD in stored:
        _refuse_untied(directory, stored[names.HEAD], stored[prefix + "embed_tokens.weight"])
    places = {names.in_file(name, prefix): name for name in names.table(cfg)}
    return {places[name]: tensor for name, tensor in stored.items() if name not in ignored}


def _refuse_untied(directory: Path, head: Tensor, embed: Tensor) -> None:
    """UserError unless the stored head equals the embedding it is tied to."""
    same = head.shape == embed.shape and head.dtype == embed.dtype
    if same:
        pairs = zip(head.blocks(), embed.blocks(), strict=True)
        same = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for (_, a), (_, b) in pairs)
    if not same:
        raise UserError(f"{directory} stores {head.name} with other values than {embed.name}; Gemma 4's head is tied.")


def parameter_dtype(parts: Sequence[tuple[Entry, Any]], wanted: str | None) -> np.dtype:
    """The dtype of a parameter made of these tensors: the wanted one, or one that holds them all."""
    if wanted is not None:
        return jnp.dtype(wanted)
    # An unreadable dtype is named when its tensor is read.
    kinds = {FLOATS.get(tensor.dtype, FLOATS["F32"]) for _, tensor in parts}
    return kinds.pop() if len(kinds) == 1 else FLOATS["F32"]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which jax on a CPU takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _write_weights(model: Transformer, directory: Path, code: str, limit: int) -> None:
    """model.safetensors, or shards and their index."""
    values = arrays(model)
    prefix = names.MULTIMODAL_PREFIX if model.cfg.is_multimodal else names.TEXT_PREFIX
    entries = {names.in_file(name, prefix): entry for name, entry in names.table(model.cfg).items()}
    sizes = {name: int(np.prod(entry.shape, dtype=np.int64)) * FLOATS[code].itemsize for name, entry in entries.items()}

    def read(name: str) -> np.ndarray:
        entry = entries[name]
        return entry.view(_on_host(values[entry.parameter], entry.index))

    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        write(directory / file, {name: entries[name].shape for name in shard}, code, read)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _on_host(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """array[index] on the host; from an accelerator only that slice is copied, on a CPU nothing is."""
    if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
        return np.ascontiguousarray(array[index] if index else array)
    return np.ascontiguousarray(np.asarray(array)[index])


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

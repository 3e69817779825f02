"""Adapters in PEFT's layout, adapter_config.json and adapter_model.safetensors, as transformers and vLLM load them.

Linear maps: lora_A [rank, inputs], lora_B [outputs, rank]. Experts, whose matrices are one tensor, are `target_parameters`
(PEFT 0.18 and later): lora_A [experts * rank, inputs] expert by expert, lora_B [outputs, rank * experts] with the experts
innermost; where both tensors of a layer have adapters PEFT nests its wrappers, and `gate_up_proj` stands in the inner one, under
`base_layer`. Source: peft 0.21, `tuners/lora/layer.py`, `ParamWrapper`.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.adapters import Base, base_digest, base_of, check_base, config_of
from gemma4_jax.checkpoint.canvas import beside
from gemma4_jax.checkpoint.hf import write_json
from gemma4_jax.checkpoint.hf_export import prefix_of
from gemma4_jax.checkpoint.load import PEFT_CONFIG, adapted, is_peft, load, load_config, read
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.names import Entry
from gemma4_jax.checkpoint.placement import Shardings, Which, dtype_name
from gemma4_jax.checkpoint.safetensors_io import read_header, write
from gemma4_jax.checkpoint.shards import read_json
from gemma4_jax.checkpoint.store import read_model_meta
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.lora import LoraConfig, adapters, merged, shaped
from gemma4_jax.model.parameters import map_arrays, modules
from gemma4_jax.model.transformer import Transformer

WEIGHTS = "adapter_model.safetensors"
BASE = "gemma4_jax_base.json"
"""Ours: the base with its digest, which PEFT has no place for."""

OUTER = "base_model.model."
"""What PEFT puts in front of every name."""

REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias")
"""Keys of adapter_config.json that mean more than A B; set, they are refused."""


def save_peft(
    model: Transformer, path: str | os.PathLike[str], config: LoraConfig, base: Base | None = None
) -> dict[str, int]:
    """Writes the adapters of a model; returns how many matrices there are of each kind of tensor (`q_proj` -> 30).

    Args:
      model: with adapters.
      path: new directory; it appears whole or not at all.
      config: their rank and scale.
      base: what they were trained beside: named in the files, and its own prefix of names (a base with towers has another one).

    Raises:
      UserError: no adapters, or `path` exists.
    """
    tensors, modules_, parameters = _tensors(model, _prefix(model.cfg, base))
    if not tensors:
        raise UserError("This model has no adapters to be saved; name a run that was trained with config.lora.")
    with beside(Path(path), what="The directory") as partial:
        partial.mkdir()
        shapes = {name: values.shape for name, values in tensors.items()}
        write(partial / WEIGHTS, shapes, "F32", lambda name: tensors[name])
        write_json(partial / PEFT_CONFIG, _config(config, base, modules_, parameters))
        if base is not None:
            write_json(partial / BASE, dataclasses.asdict(base))
    counts: dict[str, int] = {}
    for name in (*modules_, *parameters):
        kind = name.rsplit(".", 1)[-1]
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def export_peft(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
) -> dict[str, int]:
    """Writes the adapters of a training run as `save_peft` does; UserError if there are none at `source`."""
    if not adapted(source, step) or is_peft(os.fspath(source)):
        raise UserError(
            f"{os.fspath(source)} holds a whole model; format peft is for runs that were trained with config.lora."
        )
    model = load(source, step=step, base=base, merge=False)
    meta = read_model_meta(source, step)
    known = base_of(meta)
    if known is not None and base is not None:
        known = dataclasses.replace(known, path=os.path.abspath(base))
    return save_peft(model, path, config_of(meta), known)


def load_peft(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: Any = None,
    compute_dtype: Any = None,
    text_only: bool = False,
    shardings: Shardings,
    merge: bool = True,
) -> Transformer:
    """The base with the adapters of a PEFT directory, from PEFT or from here; see `load`. The base of ours is compared.

    Raises:
      UserError: no base, another base than recorded, adapters that are more than A B, or that have no place in the model.
    """
    place, known = base_path(path, base), _known(Path(path))
    how = {"text_only": text_only or (known is not None and known.text_only), "shardings": shardings}
    model = read(place, dtype=known.dtype if known else dtype, compute_dtype=compute_dtype or dtype, **how)
    if known is not None:
        check_base(known, base_digest(model), os.fspath(path), place)
    config, values = read_peft(path, model)
    model = shaped(model, config.targets, config)

    def filled(name: str, variable: Any) -> jax.Array:
        if name not in values:
            return variable.get_value()
        return jax.device_put(values[name], shardings(name, variable))

    model = map_arrays(filled, model)
    return merged(model, dtype_name(dtype)) if merge else model


def base_path(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> str:
    """Where the base of a PEFT directory lies. UserError where that is no local directory or file."""
    if base is not None:
        return os.fspath(base)
    named = read_json(Path(path) / PEFT_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).exists():
        raise UserError(
            f"The adapters in {os.fspath(path)} belong to the base {named!r}, which is no file or directory here; name it: "
            "model.base, or `load(path, base=...)`."
        )
    return named


def read_peft(path: str | os.PathLike[str], model: Transformer) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Rank, scale and weights (as targets) of a PEFT directory, and the arrays of the adapters by our names.

    A layer without an adapter where others of its stack have one gets zeros. `model` may be abstract.
    """
    folder = Path(path)
    said = read_json(folder / PEFT_CONFIG)
    if more := [key for key in REFUSED if said.get(key)]:
        raise UserError(
            f"{folder / PEFT_CONFIG} sets {', '.join(more)}, which is not read here; merge the adapters with PEFT."
        )
    try:
        rank, alpha = int(said["r"]), float(said["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / PEFT_CONFIG} does not say rank and alpha of LoRA adapters ({error}).") from error
    stored = {name: tensor.values() for name, tensor in read_header(folder / WEIGHTS).items()}
    weights = {f"{at}.w": module for at, module in modules(model) if isinstance(module, Weight)}
    prefix = next(
        (p for p in (names.MULTIMODAL_PREFIX, names.TEXT_PREFIX) if any(OUTER + p in key for key in stored)), ""
    )
    parameters = [target.rsplit(".", 1)[-1] for target in said.get("target_parameters") or ()]
    found: dict[str, tuple[Entry, np.ndarray, np.ndarray]] = {}
    for name, entry in names.table(model.cfg).items():
        fused = not name.endswith(".weight")
        if entry.parameter not in weights or (fused and name.rsplit(".", 1)[-1] not in parameters):
            continue
        key = _key(name, prefix, inner="down_proj" in parameters)
        pair = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
        if all(part in stored for part in pair):
            found[name] = entry, stored.pop(pair[0]), stored.pop(pair[1])
    if stored or not found:
        what = listed(sorted(stored)) or "nothing"
        raise UserError(
            f"{folder / WEIGHTS} holds {what}, which has no place in this model; is it another model's adapter?"
        )
    paths = tuple(sorted({entry.parameter.removesuffix(".w") for entry, _, _ in found.values()}))
    config = LoraConfig(paths, rank, alpha, bool(said.get("use_rslora")))
    blank = adapters(shaped(model, paths, config))
    arrays = {name: np.zeros(variable.get_value().shape, np.float32) for name, variable in blank.items()}
    for name, (entry, a, b) in found.items():
        at = entry.parameter.removesuffix(".w")
        ours_a, ours_b = (arrays[f"{at}.adapter.{x}"][entry.index] for x in "ab")
        lead = ours_a.shape[: ours_a.ndim - 1 - weights[entry.parameter].n_in]
        try:
            ours_a[...] = _a_from(a.astype(np.float32), lead, rank).reshape(ours_a.shape)
            ours_b[...] = _b_from(b.astype(np.float32), lead, rank).reshape(ours_b.shape)
        except ValueError as error:
            raise UserError(f"{folder / WEIGHTS}: the adapter of {name} does not fit it ({error}).") from error
    return config, arrays


def _known(folder: Path) -> Base | None:
    if not (folder / BASE).is_file():
        return None
    try:
        return Base(**read_json(folder / BASE))
    except TypeError as error:
        raise UserError(
            f"{folder / BASE} cannot be read ({error}); remove it to load without comparing the base."
        ) from error


def _prefix(cfg: ModelConfig, base: Base | None) -> str:
    """That of the base as it lies there: text trained alone may belong to a model with towers."""
    if base is not None and "://" not in base.path and Path(base.path).exists():
        cfg = load_config(base.path)
    return prefix_of(cfg)


def _tensors(model: Transformer, prefix: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Tensors by PEFT's names, the modules and the parameters they adapt."""
    held = {f"{path}.w": m for path, m in modules(model) if isinstance(m, Weight) and m.adapter is not None}
    tensors: dict[str, np.ndarray] = {}
    linears, parameters = [], []
    for name, entry in names.table(model.cfg).items():
        module = held.get(entry.parameter)
        if module is None or module.adapter is None:
            continue
        a, b = (np.asarray(x.get_value(), np.float32)[entry.index] for x in (module.adapter.a, module.adapter.b))
        lead = a.shape[: a.ndim - 1 - module.n_in]
        full = names.in_file(name, prefix)
        (parameters if lead else linears).append(full.removesuffix(".weight"))
        beside = entry.parameter.replace(".gate_up.w", ".down.w") in held
        key, rank = _key(name, prefix, inner=beside), a.shape[-1]
        tensors[key + ".lora_A.weight"] = _a_to(a.reshape(*lead, -1, rank))
        tensors[key + ".lora_B.weight"] = _b_to(b.reshape(*lead, rank, -1))
    return tensors, linears, parameters


def _key(name: str, prefix: str, *, inner: bool) -> str:
    """What PEFT calls a tensor's adapter. Of experts the wrapper; that of gate_up_proj is the `inner` one beside down_proj's."""
    full = OUTER + names.in_file(name, prefix)
    if full.endswith(".weight"):
        return full.removesuffix(".weight")
    home, parameter = full.rsplit(".", 1)
    return f"{home}.base_layer" if inner and parameter == "gate_up_proj" else home


def _a_to(a: np.ndarray) -> np.ndarray:
    """[*lead, inputs, rank] -> [lead * rank, inputs]."""
    return np.ascontiguousarray(np.swapaxes(a, -1, -2).reshape(-1, a.shape[-2]))


def _b_to(b: np.ndarray) -> np.ndarray:
    """[*lead, rank, outputs] -> [outputs, rank * lead]."""
    if b.ndim == 2:
        return np.ascontiguousarray(b.T)
    return np.ascontiguousarray(b.transpose(2, 1, 0).reshape(b.shape[-1], -1))


def _a_from(a: np.ndarray, lead: tuple[int, ...], rank: int) -> np.ndarray:
    return np.swapaxes(a.reshape(*lead, rank, -1), -1, -2)


def _b_from(b: np.ndarray, lead: tuple[int, ...], rank: int) -> np.ndarray:
    if not lead:
        return b.T
    return b.reshape(b.shape[0], rank, *lead).transpose(2, 1, 0)


def _config(config: LoraConfig, base: Base | None, linears: Iterable[str], parameters: Iterable[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else base.path,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(linears),
        "target_parameters": list(parameters) or None,
    }

"""Adapters on disk: a step that holds them alone, the base they belong to, and the two together again.

A step of such a run says which base it was trained beside (`Base`): where it lay, how it was read, and a digest of every one of
its arrays. Reading the step reads the base, and refuses one with other numbers.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.checkpoint.digest import digests
from gemma4_jax.checkpoint.mismatch import Mismatch
from gemma4_jax.checkpoint.placement import Shardings
from gemma4_jax.checkpoint.steps import absolute, read_arrays, saved_forms
from gemma4_jax.checkpoint.verified import read_as
from gemma4_jax.errors import UserError
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.lora import LoraConfig, base_names, merged, shaped
from gemma4_jax.model.packing import packed, packed_names
from gemma4_jax.model.parameters import arrays, map_arrays, modules, variables
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant import policy

SAVED = ("params.", "frozen.")


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that adapters were trained beside: where it lay, as which dtype it was read, and `base_digest` of it so."""

    path: str
    dtype: str
    text_only: bool
    digest: str


def base_digest(model: Transformer) -> str:
    """sha256 over the digests of a model's arrays, as they are in memory: one changed bit changes it."""
    total = hashlib.sha256()
    for name, digest in sorted(digests(arrays(model)).items()):
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def described(model: Transformer, config: LoraConfig, base: Base) -> dict[str, Any]:
    """What a checkpoint says about its adapters, as JSON: under "lora" of `store.model_meta`."""
    paths = [path for path, module in modules(model) if isinstance(module, Weight) and module.adapter is not None]
    return {
        "paths": paths,
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "packed": packed_names(model),
        "base": dataclasses.asdict(base),
    }


def base_of(meta: Mapping[str, Any]) -> Base | None:
    """The base that a `store.model_meta` names; None of a whole model."""
    return Base(**meta["lora"]["base"]) if "lora" in meta else None


def config_of(meta: Mapping[str, Any]) -> LoraConfig:
    """Rank and scale of the adapters of a `store.model_meta`; its targets are the weights' paths."""
    lora = meta["lora"]
    return LoraConfig(tuple(lora["paths"]), lora["rank"], lora["alpha"], lora["rslora"])


def check_base(wanted: Base, digest: str, where: str, path: str) -> None:
    """UserError unless a base is the one that the adapters at `where` were trained beside."""
    if digest != wanted.digest:
        raise UserError(
            f"The adapters in {where} were trained beside other weights than those at {path}: the digest was "
            f"{wanted.digest[:16]} and is {digest[:16]}. Put the base back as it was, or name where it lies now "
            "(model.base, or `load(path, base=...)`)."
        )


def load_adapted(
    directory: Any,
    meta: Mapping[str, Any],
    *,
    dtype: str | None,
    compute_dtype: str | None,
    shardings: Shardings,
    base: str | os.PathLike[str] | None = None,
    merge: bool = True,
    verify: bool = True,
) -> Transformer:
    """The base and the adapters of a step as one model.

    Args:
      directory: the step.
      meta: its `store.model_meta`.
      dtype: of the parameters; None: as the base was read in training, float32 for merged weights on a grid.
      compute_dtype: what layers compute in; None: `dtype`, else as in training.
      shardings: where each parameter goes.
      base: where the base lies now; None: where it lay.
      merge: add the adapters to the weights; else the model keeps them, and codes stay codes.
      verify: compare base and adapters with their digests.
    """
    from gemma4_jax.checkpoint.load import read  # which reads steps like this one

    wanted, config = _known_base(meta, directory), config_of(meta)
    place = os.fspath(base) if base is not None else wanted.path
    if base is None and "://" not in place and not absolute(place).exists():
        raise UserError(
            f"The adapters in {directory} belong to the base {place}, which is not there; put it back, or name where it lies now "
            "(model.base, or `load(path, base=...)`)."
        )
    computes = compute_dtype or dtype or meta["compute_dtype"]
    model = read(place, dtype=wanted.dtype, compute_dtype=computes, text_only=wanted.text_only, shardings=shardings)
    if verify:
        check_base(wanted, base_digest(model), str(directory), place)
    names = meta["lora"]["packed"]
    if names:
        model = packed(model, names, consume=True)
        model = map_arrays(lambda name, v: jax.device_put(v.get_value(), shardings(name, v)), model)
    model = policy.restored(shaped(model, meta["lora"]["paths"], config), meta["quant"])
    model = _filled(model, directory, shardings, verify)
    if not merge:
        return model
    model = merged(model, dtype)
    return model if dtype is None else _cast(model, dtype)


def _known_base(meta: Mapping[str, Any], directory: Any) -> Base:
    try:
        found = base_of(meta)
    except TypeError as error:
        raise UserError(f"{directory} does not say which base its adapters belong to: {error}.") from error
    assert found is not None
    return found


def _filled(model: Transformer, directory: Any, shardings: Shardings, verify: bool) -> Transformer:
    """The model with its adapters and what else the step holds; all else is the base's."""
    saved = {name: form for name, form in saved_forms(directory).items() if name.startswith(SAVED)}
    stored_as = {name.split(".", 1)[1]: name for name in saved}
    held = {name: v for name, v in variables(model).items() if name not in base_names(model)}
    wrong = Mismatch.between(
        {name: v.get_value().shape for name, v in held.items()},
        {name: saved[full].shape for name, full in stored_as.items()},
    )
    if wrong:
        raise UserError(f"{directory} does not hold the adapters of its own description: {wrong}.")
    like: dict[str, Any] = {
        stored_as[name]: jax.ShapeDtypeStruct(v.get_value().shape, jnp.float32, sharding=shardings(name, v))
        for name, v in held.items()
    }
    values = read_as(directory, like) if verify else read_arrays(directory, like)
    found = {name: values[stored_as[name]] for name in held}
    return map_arrays(lambda name, v: found.get(name, v.get_value()), model)


def _cast(model: Transformer, dtype: str) -> Transformer:
    def cast(_: str, variable):
        value = variable.get_value()
        exact = getattr(variable, "exact", False) or not jnp.issubdtype(value.dtype, jnp.floating)
        return value if exact else value.astype(dtype)

    return map_arrays(cast, model)

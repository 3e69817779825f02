"""int8 for what flows between weights: inputs and outputs of linear maps, keys and values. Fake: rounded, in their own dtype.

dynamic: a scale per token (keys and values: per token and head), absmax / 127, found as the model runs. Inputs only.
static: one scale per tensor, found once by `train.calibration` and kept in the checkpoint; inputs and outputs, as the mobile
format has them. Source: `apply_srq` of transformers' `gemma_quant.py`, scale 0 included: not calibrated, nothing is rounded.

Shared keys and values are rounded once, where they are made. Gradients pass straight through.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError
from gemma4_jax.quant.modules import copied, map_where

M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class DynamicInt8:
    """A scale for each vector along the last axis."""

    name: str = "dynamic"
    static: bool = False

    def enter(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        return _per_vector(x)

    def leave(self, y: jax.Array, scale: jax.Array | None) -> jax.Array:
        return y


@dataclasses.dataclass(frozen=True)
class StaticInt8:
    """A given scale for all of a tensor.

    The cotangent of the scale is not its derivative: it is absmax / 127, what the scale should be for this tensor. So a
    gradient brings the statistics of every layer out of scans and recomputation (`train.calibration`).
    """

    name: str = "static"
    static: bool = True

    def enter(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        assert scale is not None
        return _static(x, scale)

    leave = enter


DYNAMIC, STATIC = DynamicInt8(), StaticInt8()
SCALES = ("input_scale", "output_scale", "k_cache_scale", "v_cache_scale")
_BY_NAME = {"none": None, "dynamic": DYNAMIC, "static": STATIC}


def set_activations(model: M, activations: str, kv_cache: str) -> M:
    """The same weights in new modules that round what flows through them; those without a grid do not. Arrays may be abstract.

    Args:
      model: with its grids set.
      activations: none, dynamic or static; static adds buffers `input_scale` and `output_scale`, 0 until calibrated.
      kv_cache: none or int8; with static activations by `k_cache_scale` and `v_cache_scale`.

    Raises:
      UserError: static activations of experts, whose tokens no one tensor holds.
    """
    rounding = _BY_NAME[activations]

    def linear(path: str, module: Any) -> Any:
        new, own = copied(module), rounding if module.grid is not None else None
        if own is STATIC and module.role == "experts":
            raise UserError(
                "quant.activations=static has one scale per tensor, which experts do not have; choose dynamic or none."
            )
        new.set_rounding(own)
        return new

    def attention(path: str, module: Any) -> Any:
        new = copied(module)
        new.set_kv_rounding(None if kv_cache == "none" else STATIC if rounding is STATIC else DYNAMIC)
        return new

    return map_where(_is_linear, linear, map_where(_attends, attention, model))


def uncalibrated(model: Any) -> list[str]:
    """Names of the activation scales that are still 0; none of a model without any."""
    return [name for name, value in scales(model).items() if not bool(jnp.all(value != 0))]


def check_calibrated(model: Any) -> None:
    """UserError if static activations were never calibrated."""
    if missing := uncalibrated(model):
        raise UserError(
            f"{len(missing)} activation scales are 0, among them {missing[0]}: calibration never ran for this model. Train it "
            "with quant.activations=static and quant.calibration_batches above 0."
        )


def scales(model: Any) -> dict[str, jax.Array]:
    """The scales of static activations and of the cache by dotted name."""
    is_variable = lambda node: hasattr(node, "get_value")  # noqa: E731
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
    return {name: leaf.get_value() for name, leaf in named.items() if name.rsplit(".", 1)[-1] in SCALES}


def activation_names(model: Any) -> dict[str, str]:
    """What a checkpoint says: `activations` and `kv_cache` as `set_activations` takes them; empty for a float model."""
    linears = [node.activations.name for node in _under(model, _is_linear) if node.activations is not None]
    caches = [node for node in _under(model, _attends) if node.kv_rounding is not None]
    if not linears and not caches:
        return {}
    return {"activations": linears[0] if linears else "none", "kv_cache": "int8" if caches else "none"}


def _under(model: Any, which: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(model, is_leaf=which) if which(node)]


def _is_linear(node: Any) -> bool:
    return hasattr(node, "set_rounding")


def _attends(node: Any) -> bool:
    return hasattr(node, "set_kv_rounding")


@jax.custom_jvp
def _per_vector(x: jax.Array) -> jax.Array:
    exact = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(exact), axis=-1, keepdims=True) * (1.0 / 127)
    codes = jnp.round(exact / jnp.where(scale == 0, 1.0, scale))
    return (codes * scale).astype(x.dtype)


@_per_vector.defjvp
def _per_vector_tangent(primals, tangents):
    return _per_vector(*primals), tangents[0]


@jax.custom_vjp
def _static(x: jax.Array, scale: jax.Array) -> jax.Array:
    exact, known = x.astype(jnp.float32), scale != 0
    step = jnp.where(known, scale, 1.0)
    rounded = jnp.clip(jnp.round(exact / step), -128.0, 127.0) * step
    return jnp.where(known, rounded, exact).astype(x.dtype)


def _static_forward(x, scale):
    return _static(x, scale), jnp.max(jnp.abs(x)).astype(jnp.float32) * (1.0 / 127)


def _static_backward(seen, cotangent):
    return cotangent, seen


_static.defvjp(_static_forward, _static_backward)

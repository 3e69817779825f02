"""What of a model is quantised, and how: set it, describe it for a checkpoint, make it final.

Works on every module that has a `role`, a `grid`, a variable `w` and `rounded()`; it knows nothing else about models.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax

from gemma4_jax.errors import UserError
from gemma4_jax.quant.activations import activation_names, set_activations
from gemma4_jax.quant.blocks import BlockGrid
from gemma4_jax.quant.config import QuantConfig
from gemma4_jax.quant.coverage import Coverage, Group, coverage
from gemma4_jax.quant.grids import grid_named, int4_blocks
from gemma4_jax.quant.modules import copied, map_modules, quantisable
from gemma4_jax.quant.policies import PER_LAYER_BLOCKS, POLICIES, ROLES

__all__ = [
    "ROLES",
    "Coverage",
    "Group",
    "QuantConfig",
    "apply",
    "apply_names",
    "coverage",
    "described",
    "grid_names",
    "learning",
    "quantisable",
    "restored",
    "snap",
    "without",
]

M = TypeVar("M")


def apply(model: M, config: QuantConfig) -> M:
    """The same arrays in new modules, those of the covered roles with their grid set; `model` itself is left alone.

    Arrays may be abstract. A model that had grids before has only the new ones after. Learned scales start where the grid's rule
    has them, static scales of activations at 0 (`train.calibration`).

    Raises:
      UserError: nothing is covered, the policy is for other models, a role that `config.cover` names is not in this model, or a
        weight does not divide into blocks.
    """
    grids, present = config.grids, {module.role for _, module in quantisable(model)}
    absent = [role for role in grids if role not in present]
    if len(absent) == len(grids):
        raise UserError(f"Nothing would be quantised: this model has no {' or '.join(absent)} weights.")
    if absent and config.cover is not None:
        raise UserError(f"quant.cover names {', '.join(absent)}, but this model has no such weights; take it out.")
    POLICIES[config.policy].check(present)
    clipped = config.gradient == "clipped"
    model = _with_grids(model, lambda _, module: grids.get(module.role), clipped)
    return set_activations(learning(model) if config.learn_scales else model, *config.rounds)


def without(model: M) -> M:
    """The float model: the same weights, with nothing rounded."""
    return set_activations(_with_grids(model, lambda *_: None), "none", "none")


def grid_names(model: Any) -> dict[str, str]:
    """Dotted path of a module -> name of its grid, where it has one: what a checkpoint says about its weights."""
    return {path: module.grid.name for path, module in quantisable(model) if module.grid is not None}


def apply_names(model: M, names: Mapping[str, str]) -> M:
    """The model with the grids that `grid_names` gave for it; a UserError if one of them has no module here."""
    paths = {path for path, _ in quantisable(model)}
    if unknown := sorted(names.keys() - paths):
        raise UserError(f"The checkpoint has grids for {', '.join(unknown[:3])}, which this model does not have.")
    return _with_grids(model, lambda path, _: names.get(path))


def described(model: Any) -> dict[str, Any]:
    """All that a checkpoint says about quantisation, as JSON; empty of a float model."""
    learned = [path for path, module in quantisable(model) if module.grid_scale is not None]
    parts = {"grids": grid_names(model), "learned": learned, "rounding": activation_names(model)}
    return {key: value for key, value in parts.items() if value}


def restored(model: M, description: Mapping[str, Any]) -> M:
    """The model with what `described` said, its new scales without values; a dict of grids alone is understood too."""
    if not description:
        return model
    if "grids" not in description and "rounding" not in description:
        return apply_names(model, description)
    model = apply_names(model, description.get("grids", {}))
    model = learning(model, description["learned"]) if "learned" in description else model
    return set_activations(model, **description["rounding"]) if "rounding" in description else model


def learning(model: M, paths: Collection[str] | None = None) -> M:
    """The model whose grids' scales are parameters, where they can be: of linear maps and experts (or those named)."""

    def visit(path: str, module: Any) -> Any:
        new = copied(module)
        if module.grid is not None and hasattr(module, "learn_scales") and (paths is None or path in paths):
            new.learn_scales()
        return new

    return map_modules(visit, model)


def _with_grids(model: M, name_of: Callable[[str, Any], str | None], clipped: bool = False) -> M:
    def visit(path: str, module: Any) -> Any:
        new, name = copied(module), name_of(path, module)
        new.grid = None if name is None else dataclasses.replace(_grid_for(module, name), clipped=clipped)
        new.grid_scale = None
        try:
            jax.eval_shape(_rounded, new)
        except UserError as error:
            raise UserError(f"{path}.w ({module.role}): {error}") from error
        return new

    return map_modules(visit, model)


def _grid_for(module: Any, name: str) -> BlockGrid:
    """The grid of that name; a table of per-layer embeddings knows the width of one layer's part."""
    return int4_blocks(module.scale_dim) if name == PER_LAYER_BLOCKS else grid_named(name)


def snap(model: M) -> M:
    """The model with each weight replaced by what its grid holds, and no grids: post-training quantisation, and what exports hold.

    Bit for bit (float32) the weights that the forward pass of `model` uses; what it rounds activations to is gone. Works one
    stacked parameter at a time.

    Raises:
      UserError: no weight has a grid.
    """
    if all(module.grid is None for _, module in quantisable(model)):
        raise UserError("No weight of this model has a grid to be snapped to; quantise it with `apply` first.")

    def visit(name: str, module: Any) -> Any:
        new = copied(module)
        if module.grid is not None:
            new.w, new.grid, new.grid_scale = module.w.replace(_rounded_now(module)), None, None
        return new

    return set_activations(map_modules(visit, model), "none", "none")


def _rounded(module: Any) -> jax.Array:
    return module.rounded()


_rounded_now = jax.jit(_rounded)

"""The modules a grid can be set on: all that have a `role` and a `grid`. Nothing else here knows models."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

M = TypeVar("M")


def quantisable(model: Any) -> list[tuple[str, Any]]:
    """The modules that can have a grid, with their dotted paths, in the order of the tree."""
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=_has_grid)[0]
    return [(_dotted(path), module) for path, module in found if _has_grid(module)]


def map_modules(fn: Callable[[str, Any], Any], model: M) -> M:
    """The model with fn(dotted path, module) in place of every quantisable module; other modules are rebuilt around them."""
    return map_where(_has_grid, fn, model)


def map_where(which: Callable[[Any], bool], fn: Callable[[str, Any], Any], model: M) -> M:
    """The model with fn(dotted path, module) in place of every module that `which` picks."""

    def visit(path: Any, leaf: Any) -> Any:
        return fn(_dotted(path), leaf) if which(leaf) else leaf

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=which)


def _has_grid(node: Any) -> bool:
    return hasattr(node, "role") and hasattr(node, "grid")


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def copied(module: M) -> M:
    """The same arrays in a new module, whose attributes may be set."""
    return jax.tree.map(lambda x: x, module)

"""Which weights are quantised, on which grid: set it on a model, report it, make it final.

Works on every module that has a `role`, a `grid`, a variable `w` and `rounded()`; it knows nothing else about models.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.options import option
from gemma4_jax.quant.grids import GRIDS, BlockGrid, grid_named

M = TypeVar("M")

ROLES = {
    "attention": "q, k, v and output projections",
    "ffw": "dense feed-forward layers",
    "experts": "feed-forward layers of the experts",
    "embedding": "token embedding, which is the output head too",
    "per_layer_embedding": "per-layer embedding table of E2B and E4B",
    "per_layer": "per-layer gates and projections of E2B and E4B",
    "per_layer_projection": "the one projection that makes all per-layer inputs",
    "router": "the choice of experts",
}
"""Groups of weights, by the name that modules carry."""

FLOAT_BY_DEFAULT = {
    "per_layer_projection": "float unless named: llama.cpp leaves it at the source's type",
    "router": "never quantised: rounding changes which experts run",
}
NEVER = ("router",)
DEFAULT_COVER = tuple(role for role in ROLES if role not in FLOAT_BY_DEFAULT)
OTHER = "norms, scalars"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """What quantisation-aware training rounds, and what it learns from."""

    grid: str = option("q4_0", f"what weights are rounded to: {', '.join(GRIDS)}")
    cover: tuple[str, ...] | None = option(
        None,
        f"groups of weights to round ({', '.join(r for r in ROLES if r not in NEVER)}); none: {', '.join(DEFAULT_COVER)}",
    )
    distill_weight: float = option(
        1.0, "share of the loss that is KL divergence from the teacher, the rest is cross-entropy"
    )
    teacher: str | None = option(None, "checkpoint of the teacher; none: the float model that training starts from")
    reverse_kl: bool = option(False, "KL(student || teacher) in place of KL(teacher || student)")

    def __post_init__(self):
        grid_named(self.grid)
        for role in self.cover or ():
            if role not in ROLES:
                raise UserError(f"quant.cover has {role!r}, which is no group of weights; {did_you_mean(role, ROLES)}")
            if role in NEVER:
                raise UserError(f"quant.cover has {role!r}, which is {FLOAT_BY_DEFAULT[role]}; take it out.")
        if self.cover == ():
            raise UserError(
                f"quant.cover is empty, so nothing would be quantised; none means {', '.join(DEFAULT_COVER)}."
            )
        if not 0.0 <= self.distill_weight <= 1.0:
            raise UserError(f"quant.distill_weight is a share of the loss from 0 to 1, got {self.distill_weight}.")
        if self.distill_weight == 0.0 and (self.teacher is not None or self.reverse_kl):
            key = "quant.teacher" if self.teacher is not None else "quant.reverse_kl"
            raise UserError(
                f"{key} is set, but quant.distill_weight=0 means that no teacher is used; change one of them."
            )

    @property
    def grids(self) -> dict[str, BlockGrid]:
        """Role -> grid: all that `apply` goes by."""
        return dict.fromkeys(DEFAULT_COVER if self.cover is None else self.cover, grid_named(self.grid))


@dataclasses.dataclass(frozen=True)
class Group:
    """The weights of one role: `arrays` counts stacked parameters, bytes are those of files (float as bfloat16)."""

    role: str
    grid: BlockGrid | None
    arrays: int
    parameters: int
    reason: str = ""

    @property
    def bytes_before(self) -> float:
        """As bfloat16."""
        return 2.0 * self.parameters

    @property
    def bytes_after(self) -> float:
        """Codes and scales; as bfloat16 where there is no grid."""
        return self.bytes_before if self.grid is None else self.parameters * self.grid.bits_per_weight / 8


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What stands on which grid, and what stays float and why; the groups add up to the whole model."""

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model, buffers included."""
        return sum(group.parameters for group in self.groups)

    @property
    def covered(self) -> int:
        """Parameters on a grid."""
        return sum(group.parameters for group in self.groups if group.grid is not None)

    def table(self) -> str:
        """For people: one line per group and a total."""
        rows: list[tuple[str, ...]] = [("weights", "grid", "arrays", "parameters", "bf16 MB", "MB after", "why float")]
        for group in self.groups:
            name = group.grid.name if group.grid else "-"
            rows.append(_row(group.role, name, group.arrays, group.parameters, (group,), group.reason))
        share = f"{100 * self.covered / max(self.parameters, 1):.2f} % on a grid"
        rows.append(_row("all", "", sum(g.arrays for g in self.groups), self.parameters, self.groups, share))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def apply(model: M, config: QuantConfig) -> M:
    """The same arrays in new modules, those of the covered roles with their grid set; `model` itself is left alone.

    Arrays may be abstract. A model that had grids before has only the new ones after.

    Raises:
      UserError: nothing is covered, a role that `config.cover` names is not in this model, or a weight does not divide into
        blocks.
    """
    grids = config.grids
    absent = [role for role in grids if role not in {module.role for _, module in quantisable(model)}]
    if len(absent) == len(grids):
        raise UserError(f"Nothing would be quantised: this model has no {' or '.join(absent)} weights.")
    if absent and config.cover is not None:
        raise UserError(f"quant.cover names {', '.join(absent)}, but this model has no such weights; take it out.")
    return _with_grids(model, grids)


def grid_names(model: Any) -> dict[str, str]:
    """Role -> name of its grid, for the roles that have one: what a checkpoint says about its weights."""
    return {module.role: module.grid.name for _, module in quantisable(model) if module.grid is not None}


def apply_names(model: M, names: Mapping[str, str]) -> M:
    """The model with the grids that `grid_names` gave for it."""
    return _with_grids(model, {role: grid_named(name) for role, name in names.items()})


def _with_grids(model: M, grids: Mapping[str, BlockGrid]) -> M:
    def visit(name: str, module: Any) -> Any:
        new = _copy(module)
        new.grid = grids.get(module.role)
        try:
            jax.eval_shape(_rounded, new)
        except UserError as error:
            raise UserError(f"{name}.w ({module.role}): {error}") from error
        return new

    return _map_modules(visit, model)


def snap(model: M) -> M:
    """The model with each weight replaced by what its grid holds, and no grids: post-training quantisation, and what exports hold.

    Bit for bit (float32) the weights that the forward pass of `model` uses. Works one stacked parameter at a time.

    Raises:
      UserError: no weight has a grid.
    """
    if all(module.grid is None for _, module in quantisable(model)):
        raise UserError("No weight of this model has a grid to be snapped to; quantise it with `apply` first.")

    def visit(name: str, module: Any) -> Any:
        new = _copy(module)
        if module.grid is not None:
            new.w, new.grid = module.w.replace(_rounded_now(module)), None
        return new

    return _map_modules(visit, model)


def coverage(model: Any) -> Coverage:
    """What the grids set on `model` cover; roles the model does not have appear with 0 arrays."""
    found = quantisable(model)
    groups = []
    for role in [*ROLES, *sorted({module.role for _, module in found} - ROLES.keys())]:
        modules = [module for _, module in found if module.role == role]
        by_grid = {module.grid: [other for other in modules if other.grid == module.grid] for module in modules}
        groups += [_group(role, grid, members) for grid, members in by_grid.items()]
        if not modules:
            groups.append(Group(role, None, 0, 0, "not in this model"))
    leaves = jax.tree.leaves(model)
    rest = sum(math.prod(leaf.shape) for leaf in leaves) - sum(group.parameters for group in groups)
    groups.append(Group(OTHER, None, len(leaves) - sum(g.arrays for g in groups), rest, "vectors, not matrices"))
    return Coverage(tuple(groups))


def quantisable(model: Any) -> list[tuple[str, Any]]:
    """The modules that can have a grid, with their dotted paths, in the order of the tree."""
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=_has_grid)[0]
    return [(_dotted(path), module) for path, module in found if _has_grid(module)]


def _row(name: str, grid: str, arrays: int, parameters: int, groups: Sequence[Group], note: str) -> tuple[str, ...]:
    before, after = sum(g.bytes_before for g in groups), sum(g.bytes_after for g in groups)
    return name, grid, str(arrays), f"{parameters:,}", f"{before / 1e6:,.2f}", f"{after / 1e6:,.2f}", note


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    words = (0, 1, len(row) - 1)
    cells = (
        cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _group(role: str, grid: BlockGrid | None, modules: list[Any]) -> Group:
    leaves = jax.tree.leaves(modules)
    reason = "" if grid is not None else FLOAT_BY_DEFAULT.get(role, "not in quant.cover")
    return Group(role, grid, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves), reason)


def _map_modules(fn: Callable[[str, Any], Any], model: M) -> M:
    """The model with fn(dotted path, module) in place of every quantisable module; other modules are rebuilt around them."""

    def visit(path: Any, leaf: Any) -> Any:
        return fn(_dotted(path), leaf) if _has_grid(leaf) else leaf

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=_has_grid)


def _has_grid(node: Any) -> bool:
    return hasattr(node, "role") and hasattr(node, "grid")


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _copy(module: M) -> M:
    return jax.tree.map(lambda x: x, module)


def _rounded(module: Any) -> jax.Array:
    return module.rounded()


_rounded_now = jax.jit(_rounded)

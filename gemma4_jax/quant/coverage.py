"""What a policy covers, in words and bytes: the report before the first step."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gemma4_jax.quant.blocks import BlockGrid
from gemma4_jax.quant.modules import quantisable
from gemma4_jax.quant.policies import ROLES

OTHER = "norms, scalars"
"""With what belongs to no group: scales of activations are here, learned scales of grids are bytes of their groups."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The weights of one role on one grid: `arrays` counts stacked parameters, bytes are those of files (float as bfloat16)."""

    role: str
    grid: BlockGrid | None
    arrays: int
    parameters: int
    bytes_after: float
    reason: str = ""

    @property
    def bytes_before(self) -> float:
        """As bfloat16."""
        return 2.0 * self.parameters


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What stands on which grid, and what stays float and why; the groups add up to the whole model."""

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model, buffers included, learned scales of grids left out."""
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


def coverage(model: Any, stays: Mapping[str, str] | None = None) -> Coverage:
    """What the grids set on `model` cover; roles the model does not have appear with 0 arrays.

    `stays` says why a role is float (`QuantConfig.stays`).
    """
    found, why = quantisable(model), stays or {}
    groups = []
    for role in [*ROLES, *sorted({module.role for _, module in found} - ROLES.keys())]:
        modules = [module for _, module in found if module.role == role]
        by_grid = {module.grid: [other for other in modules if other.grid == module.grid] for module in modules}
        groups += [_group(role, grid, members, why.get(role, "no grid")) for grid, members in by_grid.items()]
        if not modules:
            groups.append(Group(role, None, 0, 0, 0.0, "not in this model"))
    learned = {id(leaf) for _, module in found for leaf in jax.tree.leaves(module.grid_scale)}
    leaves = [leaf for leaf in jax.tree.leaves(model) if id(leaf) not in learned]
    rest = sum(math.prod(leaf.shape) for leaf in leaves) - sum(group.parameters for group in groups)
    left = len(leaves) - sum(group.arrays for group in groups)
    groups.append(Group(OTHER, None, left, rest, 2.0 * rest, "vectors, not matrices"))
    return Coverage(tuple(groups))


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


def _group(role: str, grid: BlockGrid | None, modules: list[Any], why: str) -> Group:
    weights = [module.w.get_value() for module in modules]
    size = sum(math.prod(w.shape) for w in weights)
    if grid is None:
        return Group(role, None, len(weights), size, 2.0 * size, why)
    files = jax.eval_shape(lambda modules: [module.encoded() for module in modules], modules)
    bits = sum(grid.code_bits * codes.size + grid.scale_bits * scales.size for codes, scales in files)
    return Group(role, grid, len(weights), size, bits / 8)

"""The parts of a model that a run trains or leaves as they are: decoder, towers, projectors."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.model.parameters import is_trainable, variables
from gemma4_jax.tables import table

DECODER = "decoder"
PARTS: dict[str, tuple[str, ...]] = {
    DECODER: (),  # whatever belongs to no other part
    "vision": ("vision",),
    "audio": ("audio",),
    "projectors": ("vision_projection", "audio_projection"),
}
"""Part -> the modules of the model it consists of."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    module = name.partition(".")[0]
    return next((part for part, modules in PARTS.items() if module in modules), DECODER)


def check_parts(parts: Iterable[str], key: str) -> None:
    """UserError for a name that is no part of any model, or none at all."""
    parts = tuple(parts)
    wrong = [part for part in parts if part not in PARTS]
    if wrong:
        raise UserError(f"{key} has {wrong[0]!r}, which is no part of a model; {did_you_mean(wrong[0], PARTS)}")
    if not parts:
        raise UserError(f"{key} is empty, so nothing would be trained; name some of {', '.join(PARTS)}.")


def left_out(model: nnx.Module, train: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the parameters of all parts but those to `train`, as `optim.freeze` has them; arrays may be abstract.

    Raises:
      UserError: a part that this model does not have.
    """
    names = [name for name, variable in variables(model).items() if is_trainable(variable)]
    present, train = {part_of(name) for name in names}, tuple(train)
    absent = [part for part in train if part not in present]
    if absent:
        known = [part for part in PARTS if part in present]
        raise UserError(
            f"optim.train names {absent[0]!r}, which this model does not have; {did_you_mean(absent[0], known)}"
        )
    return tuple(sorted({f"{name.partition('.')[0]}.*" for name in names if part_of(name) not in train}))


def coverage(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """A table of the parts with what of them moves and what stays, from arrays by name."""
    rows = []
    for part in PARTS:
        groups = [[x for name, x in values.items() if part_of(name) == part] for values in (params, frozen)]
        if any(groups):
            rows.append((part, *(text for group in groups for text in (len(group), f"{sum(x.size for x in group):,}"))))
    return table(("part", "arrays trained", "parameters", "arrays that stay", "parameters"), rows)

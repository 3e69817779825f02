"""The manifest beside an export: what was rounded to what, how far it moved, and from which checkpoint it came."""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.checkpoint.export import Outcome
from gemma4_jax.checkpoint.shards import read_json
from gemma4_jax.checkpoint.source import Source
from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import BlockGrid, grid_named

FILE = "quantization_manifest.json"
VERSION = 1
Manifest = Callable[[Outcome], Mapping[str, Any]]
"""What is to be written beside an export once its outcome is known."""


def path_beside(target: Path) -> Path:
    """Where the manifest of an export stands: inside a directory, beside a file."""
    return target.with_name(f"{target.name}.manifest.json") if target.suffix == ".gguf" else target / FILE


def describe(source: Source, outcome: Outcome, *, form: str, dtype: str, policy: str | None) -> dict[str, Any]:
    """The manifest as JSON.

    Of each tensor `relative_error` is the root of the squared difference between what the file decodes to and the float weights
    of the source, over the squared weights.
    """
    return {
        "version": VERSION,
        "format": form,
        "dtype": dtype,
        "how": how(source, policy),
        "activations": activations(source, form),
        "policy": policy,
        "grids": {parameter: grid.name for parameter, grid in source.grids.items()},
        "source": {"path": source.origin, "sha256": source.digest()},
        "written_with": {name: importlib.metadata.version(name) for name in ("gemma4_jax", "jax", "numpy")},
        "tensors": {
            fate.name: {
                "stored_as": fate.label,
                "grid": fate.grid,
                "shape": list(fate.shape),
                "relative_error": float(f"{fate.relative_error:.4g}"),
                "blocks_moved": fate.off,
            }
            for fate in outcome.fates
        },
    }


def how(source: Source, policy: str | None) -> str:
    """Where the values of the file come from, in words."""
    trained = bool(source.trained)
    if policy is not None:
        return f"post-training quantisation by policy {policy}" + (" of a model trained on a grid" if trained else "")
    return "as trained on its grids" if trained else "float: nothing was rounded to a grid"


def activations(source: Source, form: str) -> str:
    """What becomes of rounded activations, in words."""
    count = len(source.activation_scales())
    if not count:
        return "not rounded by given scales"
    return f"{count} static scales" + ("" if form == "mobile" else f", left out: {form} has no place for them")


def declared_grids(directory: Path) -> Mapping[str, BlockGrid]:
    """Parameter -> grid, as the manifest in a directory says; empty without one."""
    file = directory / FILE
    if not file.is_file():
        return {}
    grids = read_json(file).get("grids")
    if not isinstance(grids, dict):
        raise UserError(
            f"{file} is no manifest of this project: it has no 'grids'; remove it to load the weights as float."
        )
    return {parameter: grid_named(str(name)) for parameter, name in grids.items()}


def text_of(value: Mapping[str, Any]) -> str:
    """As written."""
    return json.dumps(value, indent=1) + "\n"

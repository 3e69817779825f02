"""Step directories of Orbax, read: which are there, what they hold, and their arrays.

A step directory holds two items: `state`, a flat dict of arrays by dotted name, and `meta`, JSON.
"""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.placement import Which
from gemma4_jax.errors import UserError

FORMAT = 1
_ITEMS = ("state", "meta")


class _OrbaxIsQuiet(logging.Filter):
    """Drops Orbax's progress reports; what matters comes as an exception."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_OrbaxIsQuiet())


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a model directory, a training step, or a run with committed steps."""
    directory = absolute(path)
    return _is_step(directory) or any(committed_steps(root) for root in _roots(directory))


def step_directory(path: str | os.PathLike[str], step: Which = "latest") -> epath.Path:
    """The step directory that `path` is, or the one of its steps that `step` asks for.

    A run's steps stand in it directly or in its `checkpoints`.
    """
    directory, root = _step_or_run(path)
    if root is None:
        return directory
    steps = committed_steps(root)
    chosen = max(steps) if step == "latest" else best_step(root) if step == "best" else step
    if chosen is None:
        raise UserError(f"No step in {root} was saved with a metric, so none is best; use step='latest'.")
    if chosen not in steps:
        raise UserError(f"{root} has no step {chosen}; committed steps: {listed(map(str, steps))}.")
    return root / str(chosen)


def step_directories(path: str | os.PathLike[str]) -> list[epath.Path]:
    """The step directory that `path` is, or all committed ones of the run."""
    directory, root = _step_or_run(path)
    return [directory] if root is None else [root / str(step) for step in committed_steps(root)]


def _step_or_run(path: str | os.PathLike[str]) -> tuple[epath.Path, epath.Path | None]:
    """`path`, and where its steps are if it is a run."""
    directory = absolute(path)
    if not directory.exists():
        raise UserError(f"The checkpoint directory {str(directory)!r} does not exist.")
    if _is_step(directory):
        return directory, None
    root = next((root for root in _roots(directory) if committed_steps(root)), None)
    if root is None:
        raise UserError(
            f"{directory} holds no committed checkpoint; wanted a model directory, a step, or a training run."
        )
    return directory, root


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps in a run's directory whose writing was finished, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isascii() and p.name.isdigit() and _is_step(p))


def best_step(directory: epath.Path) -> int | None:
    """The committed step that its own metric ranks first; None where no step has one."""
    ranks = {}
    for step in committed_steps(directory):
        record = read_record(directory / str(step))
        if record.get("ranked_by"):
            metric, mode = record["ranked_by"]
            ranks[step] = rank(record["metrics"][metric], mode)
    ranks = {step: value for step, value in ranks.items() if value > -math.inf}
    return max(ranks, key=lambda step: (ranks[step], -step), default=None)


def read_record(directory: epath.Path) -> dict[str, Any]:
    """The JSON item of a step: the caller's `meta`, `metrics`, `ranked_by`."""
    with _naming_damage(directory), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        record = reader.restore(directory / "meta", args=ocp.args.JsonRestore())
    if not isinstance(record, dict) or not isinstance(record.get("meta"), dict):
        raise UserError(f"{directory} is damaged or not ours: its meta item is no record of this project.")
    if record.get("format") != FORMAT:
        raise UserError(f"{directory} has checkpoint format {record.get('format')!r}; this version reads {FORMAT}.")
    return record


@dataclasses.dataclass(frozen=True)
class Form:
    """Shape and dtype of an array, saved or wanted."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def form_of(value: Any) -> Form:
    """Of an array, a ShapeDtypeStruct, or Orbax's metadata of one."""
    return Form(tuple(value.shape), jnp.dtype(value.dtype).name)


def saved_forms(directory: epath.Path) -> dict[str, Form]:
    """What a step holds, without reading it."""
    with _naming_damage(directory), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(directory / "state").item_metadata.tree
        return {name: form_of(value) for name, value in tree.items()}


def read_arrays(directory: epath.Path, like: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays named in `like`, in its dtypes and shardings; others are not read."""
    how = {}
    for name, value in like.items():
        sharding = value.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        how[name] = ocp.ArrayRestoreArgs(dtype=value.dtype, sharding=sharding, global_shape=value.shape)
    structs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in like.items()}
    with _naming_damage(directory), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=structs, restore_args=how, partial_restore=True)
        return reader.restore(directory / "state", args=args)


@contextlib.contextmanager
def _naming_damage(directory: epath.Path) -> Iterator[None]:
    """Turns whatever reading a step raises into one sentence, unless memory ran out: for bad data Orbax raises anything."""
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"The checkpoint {directory} is damaged or incomplete: {first[:300]}") from error


def rank(value: float, mode: str) -> float:
    """A number that is larger for better values; NaN is worst."""
    return -math.inf if math.isnan(value) else value if mode == "max" else -value


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """A local path made absolute, as Orbax wants it; an object store's address as it is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _is_step(directory: epath.Path) -> bool:
    """Whether a directory is a step that Orbax finished writing.

    A local step gets its name last, by a rename; object stores have no rename, there a mark is written last. A finished
    step that has lost a part counts too: reading it is an error that names it, not a silent step back.
    """
    if not any((directory / item).exists() for item in _ITEMS):
        return False
    return "://" not in os.fspath(directory) or (directory / "commit_success.txt").exists()


def _roots(directory: epath.Path) -> tuple[epath.Path, epath.Path]:
    return directory, directory / "checkpoints"

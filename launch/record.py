"""What a run was told to do, for the eye and for the next run in the same directory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.errors import UserError
from gemma4_jax.tables import near
from launch import schema, settings


def summary(run: settings.Run) -> str:
    """The keys that differ from their defaults, one a line: what makes this run this run."""
    chosen = changed(schema.to_mapping(run), known(type(run)))
    width = max((len(key) for key in chosen), default=0)
    return "\n".join(f"  {key:<{width}}  {'none' if value is None else value}" for key, (value, _) in chosen.items())


def changed(mapping: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value, default) of the settings that differ from `defaults` (`known`), by dotted name; "" for a default nobody knows."""
    return {
        key: (near(value), defaults.get(key, ""))
        for key, value in flat(mapping).items()
        if key != "task" and (key not in defaults or defaults[key] != value)
    }


def keep_config(run: settings.Run, write: bool = True) -> None:
    """Writes the resolved settings into the working directory, and refuses one that holds a run with other settings.

    Only keys marked `may_change` may differ from those of the run that is resumed; a run that saved nothing yet binds nobody.
    Written under another name and renamed, so that a killed process leaves the old file or the new one; of several
    processes only one does `write`.
    """
    if run.workdir is None:
        return
    path = Path(run.workdir) / f"config_{run.task}.json"
    now = json.loads(json.dumps(schema.to_mapping(run)))
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); remove it to run in this directory.") from error
        if isinstance(run, settings.TrainRun) and any(path.parent.glob("checkpoints/[0-9]*")):
            _refuse_other_config(before, now, type(run), path)
    if not write:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(now, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"config.workdir {run.workdir!r} cannot be written: {error.strerror}.") from error


def _refuse_other_config(before: Mapping[str, Any], now: Mapping[str, Any], cls: type, path: Path) -> None:
    fields = {key: schema.field_of(owner, name) for key, owner, name in schema.paths(cls)}
    changing = {key for key, field in fields.items() if field.metadata.get("may_change")}
    old, new = flat(before), flat(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if key not in changing and old.get(key) != new.get(key)]
    if keys:
        listed = "; ".join(f"config.{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in keys)
        raise UserError(
            f"{path.parent} holds a run with another config: {listed}. Choose another config.workdir, or set them back."
        )


def known(cls: type) -> dict[str, Any]:
    """Every default of a task, by dotted name; of sections that are none by default too."""
    found = flat(json.loads(json.dumps(schema.default_mapping(cls))))
    return found | {f"eval_{key}": value for key, value in found.items() if key.startswith("data.")}


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

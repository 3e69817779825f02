"""Writes the golden fixtures with transformers and torch, or (`--check`) compares them with a fresh computation.

    python tests/golden/generate.py            # write everything
    python tests/golden/generate.py --check    # weights and configs exactly, numbers within the stated tolerances
    python tests/golden/generate.py tiny_e2b   # one fixture only

Needs the extras `parity` and `media`. Exit status 1 when `--check` finds a difference; each is one line: where and how big.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import read_tensors, write_checkpoint
from drafters import DRAFTERS, LOGITS_MAX, compute_drafts, write_drafter
from expected import TOLERANCES, compute
from full_size import config_files, shapes_json
from media import TOLERANCES as MEDIA_TOLERANCES
from media import compute_media, preprocessing
from structures import MEDIA, TINY

HERE = Path(__file__).parent


def write_tiny(name: str, directory: Path) -> None:
    """Writes one fixture: checkpoint, expected.npz, expected.json."""
    write_checkpoint(TINY[name], directory)
    arrays, scalars = compute(name, TINY[name], directory)
    np.savez_compressed(directory / "expected.npz", allow_pickle=False, **arrays)
    (directory / "expected.json").write_text(json.dumps(scalars, indent=1) + "\n")
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name}: {size / 1e6:.2f} MB, noise floor {scalars['noise_floor']}")


def write_media(name: str, directory: Path) -> None:
    """Writes one multimodal fixture: checkpoint, expected.npz, expected.json."""
    write_checkpoint(MEDIA[name], directory)
    arrays, scalars = compute_media(name, MEDIA[name], directory)
    np.savez_compressed(directory / "expected.npz", allow_pickle=False, **arrays)
    (directory / "expected.json").write_text(json.dumps(scalars, indent=1) + "\n")
    print(f"{name}: {sum(path.stat().st_size for path in directory.iterdir()) / 1e6:.2f} MB")


def write_drafts(name: str, directory: Path) -> None:
    """Writes one drafter: checkpoint and expected.npz."""
    write_drafter(DRAFTERS[name], directory)
    np.savez_compressed(
        directory / "expected.npz", allow_pickle=False, **compute_drafts(DRAFTERS[name], directory, HERE)
    )
    print(f"{name}: {sum(path.stat().st_size for path in directory.iterdir()) / 1e6:.2f} MB")


def write_full_size() -> None:
    """Writes full_size_shapes.json and configs/."""
    (HERE / "full_size_shapes.json").write_text(shapes_json())
    (HERE / "configs").mkdir(exist_ok=True)
    for file, text in config_files().items():
        (HERE / "configs" / file).write_text(text)


def compare_checkpoints(name: str, committed: Path, fresh: Path) -> list[str]:
    """Returns one line per tensor or config field that is not exactly equal."""
    old, new = read_tensors(committed), read_tensors(fresh)
    lines = [f"{name}: tensor {key} is in one checkpoint only" for key in old.keys() ^ new.keys()]
    lines += [f"{name}: tensor {k} differs" for k in old.keys() & new.keys() if not torch.equal(old[k], new[k])]
    configs = [json.loads((path / "config.json").read_text()) for path in (committed, fresh)]
    for config in configs:
        config.pop("transformers_version")
    if configs[0] != configs[1]:
        lines.append(f"{name}: config.json differs")
    return lines


def compare_array(key: str, old: np.ndarray, new: np.ndarray) -> str | None:
    """Returns why two arrays of expected.npz differ by more than the tolerances allow, or None."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"shape or dtype {new.shape} {new.dtype}, committed {old.shape} {old.dtype}"
    if old.dtype.kind == "i":
        return None if np.array_equal(old, new) else f"{(old != new).sum()} of {old.size} integers differ"
    if key.startswith("gradient"):
        error = float(np.linalg.norm(old - new) / np.linalg.norm(old))
        limit = TOLERANCES["gradient_relative"][0]
        return None if error <= limit else f"relative difference {error:.1e}, allowed {limit:.0e}"
    error = np.abs(old - new)
    if error.max() > TOLERANCES["logits_max"][0] or error.mean() > TOLERANCES["logits_mean"][0]:
        return f"difference {error.max():.1e} max, {error.mean():.1e} mean"
    return None


def check_media(name: str) -> list[str]:
    """Returns every difference between the committed multimodal fixture and one made now."""
    committed = HERE / name
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        write_checkpoint(MEDIA[name], fresh)
        lines = compare_checkpoints(name, committed, fresh)
        arrays, scalars = compute_media(name, MEDIA[name], fresh)
    with np.load(committed / "expected.npz") as stored:
        old = dict(stored)
    lines += [f"{name}: array {key} is on one side only" for key in old.keys() ^ arrays.keys()]
    for key in sorted(old.keys() & arrays.keys()):
        if reason := compare_media_array(key, old[key], arrays[key]):
            lines.append(f"{name}: {key}: {reason}")
    facts = json.loads((committed / "expected.json").read_text())
    for case, new in scalars["cases"].items():
        if abs(new["loss"] / facts["cases"][case]["loss"] - 1.0) > MEDIA_TOLERANCES["loss_relative"][0]:
            lines.append(f"{name}: {case}: loss {new['loss']!r}, committed {facts['cases'][case]['loss']!r}")
    return lines


def compare_media_array(key: str, old: np.ndarray, new: np.ndarray) -> str | None:
    """Returns why two arrays of a multimodal expected.npz differ by more than the tolerances allow, or None."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"shape or dtype {new.shape} {new.dtype}, committed {old.shape} {old.dtype}"
    if old.dtype.kind == "i":
        return None if np.array_equal(old, new) else f"{(old != new).sum()} of {old.size} integers differ"
    if "/gradient/" in key:
        error = float(np.linalg.norm(old - new) / np.linalg.norm(old))
        return None if error <= MEDIA_TOLERANCES["gradient_relative"][0] else f"relative difference {error:.1e}"
    kind = "logits_max" if key.endswith("/logits") else "mel_max" if key.startswith("mel/") else "features_max"
    error = float(np.abs(old - new).max())
    return None if error <= MEDIA_TOLERANCES[kind][0] else f"difference {error:.1e}"


def check_drafts(name: str) -> list[str]:
    """Returns every difference between the committed drafter and one made now."""
    committed = HERE / name
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        write_drafter(DRAFTERS[name], fresh)
        lines = compare_checkpoints(name, committed, fresh)
        arrays = compute_drafts(DRAFTERS[name], fresh, HERE)
    with np.load(committed / "expected.npz") as stored:
        old = dict(stored)
    if old.keys() != arrays.keys():
        return [*lines, f"{name}: other arrays"]
    for key, new in arrays.items():
        if old[key].shape != new.shape or not np.allclose(old[key], new, rtol=0, atol=LOGITS_MAX, equal_nan=True):
            lines.append(f"{name}: {key} differs")
    return lines


def check_preprocessing() -> list[str]:
    """Returns a line if the pixels that transformers makes now are not those committed."""
    stored = json.loads((HERE / "preprocessing.json").read_text())
    return [] if stored["pictures"] == preprocessing()["pictures"] else ["preprocessing.json differs"]


def compare_scalars(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns one line per scalar (loss, gradient norms) outside its tolerance."""
    lines = []
    if abs(new["loss"] / old["loss"] - 1.0) > TOLERANCES["loss_relative"][0]:
        lines.append(f"loss {new['loss']!r}, committed {old['loss']!r}")
    if old["trained_positions"] != new["trained_positions"]:
        lines.append(f"trained_positions {new['trained_positions']}, committed {old['trained_positions']}")
    for group in ("gradient_norms", "gradient_norms_with_row_0"):
        lines += [f"{group}: {key} is on one side only" for key in old[group].keys() ^ new[group].keys()]
        for key in old[group].keys() & new[group].keys():
            if abs(new[group][key] / old[group][key] - 1.0) > TOLERANCES["gradient_norm_relative"][0]:
                lines.append(f"{group}: {key} {new[group][key]!r}, committed {old[group][key]!r}")
    return lines


def check_tiny(name: str) -> list[str]:
    """Returns every difference between the committed fixture and one made now."""
    committed = HERE / name
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        write_checkpoint(TINY[name], fresh)
        lines = compare_checkpoints(name, committed, fresh)
        arrays, scalars = compute(name, TINY[name], fresh)
    with np.load(committed / "expected.npz") as stored:
        old = dict(stored)
    lines += [f"{name}: array {key} is on one side only" for key in old.keys() ^ arrays.keys()]
    for key in sorted(old.keys() & arrays.keys()):
        if reason := compare_array(key, old[key], arrays[key]):
            lines.append(f"{name}: {key}: {reason}")
    stored_scalars = json.loads((committed / "expected.json").read_text())
    return lines + [f"{name}: {line}" for line in compare_scalars(stored_scalars, scalars)]


def check_full_size() -> list[str]:
    """Returns every file of the full-size descriptions that differs from one made now."""
    fresh = {HERE / "full_size_shapes.json": shapes_json()}
    fresh |= {HERE / "configs" / file: text for file, text in config_files().items()}
    lines = []
    for path, text in fresh.items():
        old, new = json.loads(path.read_text()), json.loads(text)
        for config in (old, new):
            config.pop("transformers_version", None)
        if old != new:
            lines.append(f"{path.relative_to(HERE)} differs")
    return lines


def programs(name: str) -> tuple[Callable[[str, Path], None], Callable[[str], list[str]]]:
    """Returns what writes and what checks a fixture of this name."""
    if name in DRAFTERS:
        return write_drafts, check_drafts
    return (write_tiny, check_tiny) if name in TINY else (write_media, check_media)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of write")
    parser.add_argument(
        "only",
        nargs="*",
        metavar="FIXTURE",
        help=f"any of {', '.join([*TINY, *MEDIA, *DRAFTERS])}; default: everything",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(TINY) - set(MEDIA) - set(DRAFTERS):
        listed = ", ".join([*TINY, *MEDIA, *DRAFTERS])
        parser.error(f"unknown fixture {', '.join(sorted(unknown))}; there are {listed}.")
    torch.set_num_threads(1)  # the same summation order on every machine, and faster for matrices this small
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = arguments.only or [*TINY, *MEDIA, *DRAFTERS]
    if not arguments.check:
        for name in names:
            programs(name)[0](name, HERE / name)
        if not arguments.only:
            write_full_size()
            (HERE / "preprocessing.json").write_text(json.dumps(preprocessing(), indent=1) + "\n")
        return 0
    lines = [line for name in names for line in programs(name)[1](name)]
    lines += [] if arguments.only else check_full_size() + check_preprocessing()
    print("\n".join(lines) if lines else f"{', '.join(names)}: the committed fixtures equal a fresh computation.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

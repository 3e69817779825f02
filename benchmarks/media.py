"""Pictures and seconds of sound a second, from pixels and samples to soft tokens, beside transformers on the same weights.

    python -m benchmarks.media [--quick] [--towers small large] [--turns N] [--peer NAME=PYTHON] [--save]

The towers are of published size (small: those of E2B and E4B; large: the eyes of 26B-A4B and 31B), the text model behind them is
tiny. Both sides are processes of their own that take turns (`worker.py`), after a turn that compiles, and must agree on the soft
tokens. A picture is resized, cut and looked at alone, as a request is; sounds come as one batch.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import keep
from benchmarks.worker import Answer, add_peers, given_peers, worker
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.tables import table

TEXT = dict(hidden_size=64, num_hidden_layers=10, num_kv_shared_layers=0, intermediate_size=64, head_dim=16)
TEXT |= dict(global_head_dim=32, sliding_window=16, hidden_size_per_layer_input=0, use_double_wide_mlp=False)
TOWERS = {"small": ("e2b", TEXT), "large": ("31b", TEXT | dict(num_hidden_layers=6))}
"""A variant whose towers these are, and what makes its text model tiny."""

PICTURES = ((480, 640, 280), (1024, 768, 280), (300, 900, 70))
"""Height, width and most soft tokens."""

SECONDS = (3.7, 12.0, 30.0)
WANTED = {"images_per_s": 1.0, "audio_s_per_s": 1.0}
"""Times as fast as transformers that this project means to be at least."""

TOLERANCE = 1e-3
"""Largest difference of soft tokens, relative to their largest: float32 sums in another order through 27 layers."""

PEERS = {"transformers": "benchmarks.peer_transformers_media"}
"""Its environment has torch and Pillow too."""
TAME = 0.1
"""Scale of the norms behind attention and feed-forward in the eyes. With 1, random layers amplify rounding until transformers in
float32 is 2.3e-2 away from itself in float64 (large towers), and a comparison shows nothing."""


def compare(names: list[str], *, quick: bool, turns: int, peers: dict[str, Path], save: bool) -> None:
    """Prints medians and ratios; UserError if the sides see or hear different things."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    busy = "; TOO BUSY for the numbers to mean much" * (load > 0.75 * cores)
    print(f"{cores} cores, load average {load:.2f}{busy}", flush=True)
    sides = {"gemma4_jax": (sys.executable, "benchmarks.ours_media")}
    sides |= {name: (str(python.absolute()), PEERS[name]) for name, python in peers.items()}
    records = []
    for name in names:
        command = f"python -m benchmarks.media{' --quick' * quick} --towers {name} --turns {turns}"
        records += [{"command": command, **record} for record in _measure(name, quick, turns, sides)]
    header = ("towers", "by", "images/s", "of that preparing s", "audio s/s", "of that preparing s", "GB")
    print(table(header, [_row(record) for record in records]))
    for name in names:
        print(*_ratios([record for record in records if record["towers"] == name]), sep="\n")
    print(*dict.fromkeys(f"{record['by']}: {record['version']}" for record in records), sep="\n")
    if save:
        keep.save("media_quick" if quick else "media", records, load)


def _measure(name: str, quick: bool, turns: int, sides: dict[str, tuple[str, str]]) -> list[Answer]:
    variant, sizes = TOWERS[name]
    cfg = ModelConfig.variant(f"tiny_{variant}" if quick else variant, multimodal=True, **sizes)
    rng = np.random.default_rng(0)
    pictures = PICTURES[-1:] if quick else PICTURES
    seconds = () if cfg.audio is None else SECONDS[:1] if quick else SECONDS
    given: dict[str, Any] = {f"picture{i}": _picture(rng, *size[:2]) for i, size in enumerate(pictures)}
    given |= {f"budget{i}": np.int64(size[2]) for i, size in enumerate(pictures)}
    given |= {f"sound{i}": rng.normal(0, 0.1, round(16_000 * s)).astype(np.float32) for i, s in enumerate(seconds)}
    with contextlib.ExitStack() as stack:
        checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_hf(_scrambled(init(cfg)), checkpoint, dtype="float32")
        np.savez(checkpoint / "media.npz", **given)
        step = {by: stack.enter_context(worker(*side, checkpoint)) for by, side in sides.items()}
        first = {by: step[by]() for by in sides}
        _same(name, checkpoint, list(sides))
        answers: dict[str, list[Answer]] = {by: [] for by in first}
        for turn in range(turns):
            for by in list(sides)[:: 1 if turn % 2 else -1]:
                answers[by].append(step[by]())
    records = []
    for by, found in answers.items():
        times = {key: [answer[key] for answer in found] for key in ("images_s", "prepare_images_s", "audio_s", "mel_s")}
        medians = {key: statistics.median(values) for key, values in times.items()}
        medians["images_per_s"] = len(pictures) / medians["images_s"]
        medians["audio_s_per_s"] = sum(seconds) / medians["audio_s"] if seconds else 0.0
        facts = {key: found[-1][key] for key in ("version", "peak_gb")}
        records.append({"towers": name, "by": by, **facts, **medians, "times": times})
    return records


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coarse blocks with fine noise."""
    blocks = rng.integers(0, 200, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)[:height, :width]
    return (blocks + rng.integers(0, 56, blocks.shape)).astype(np.uint8)


def _scrambled(model: Transformer) -> Transformer:
    """Clip bounds that bite now and then (infinite ones could be skipped), and layers that do not amplify rounding."""
    bounds = {"input_min": -4.0, "output_min": -4.0, "input_max": 4.0, "output_max": 4.0}

    def value(name: str, variable: Any) -> Any:
        old, bound = variable.get_value(), bounds.get(name.rsplit(".", 1)[-1])
        if name.startswith("vision.") and ".post_" in name:
            bound = TAME
        return old if bound is None else np.full(old.shape, bound, np.float32)

    return map_arrays(value, model)


def _same(name: str, checkpoint: Path, sides: list[str]) -> None:
    """UserError unless the soft tokens that the sides wrote down agree."""
    found = [np.load(checkpoint / f"soft_{by}.npz") for by in sides]
    for by, other in zip(sides[1:], found[1:], strict=True):
        for key in found[0]:
            ours, theirs = found[0][key], other[key]
            far = np.abs(ours - theirs).max() / np.abs(theirs).max() if ours.shape == theirs.shape else np.inf
            if not far <= TOLERANCE:
                raise UserError(
                    f"{name}: soft tokens of {key} differ from those of {by} by {far:.1e}, shapes {ours.shape}."
                )


def _row(record: Answer) -> tuple[Any, ...]:
    prepared = (f"{record[key]:.3f}" for key in ("prepare_images_s", "mel_s"))
    heard = f"{record['audio_s_per_s']:.1f}" if record["audio_s_per_s"] else "-"
    preparing, mel = prepared
    return record["towers"], record["by"], f"{record['images_per_s']:.2f}", preparing, heard, mel, record["peak_gb"]


def _ratios(records: list[Answer]) -> list[str]:
    ours, *others = records
    lines = []
    for other in others:
        for key, wanted in WANTED.items():
            if other[key]:
                ratio = ours[key] / other[key]
                lines.append(f"{ours['towers']} {key}: {ratio:.2f} times as fast as {other['by']} (wanted {wanted})")
    return lines


def main() -> None:
    """Exits with 1 and the reason on stderr if the comparison is not valid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.media", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="default: all")
    parser.add_argument("--turns", type=int, choices=range(1, 100), metavar="N", default=5, help="of each side")
    add_peers(parser, PEERS)
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results")
    options = parser.parse_args()
    peers = given_peers(parser, options.peer, PEERS)
    try:
        compare(options.towers, quick=options.quick, turns=options.turns, peers=peers, save=options.save)
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()

"""A real-size E2B with random weights (4.6 billion parameters, bfloat16, 9.3 GB) converted and exported: MB/s, peak memory.

`orbax` is task=convert to our directory, `hf_of_orbax` the way back from it. Each is a process of its own, so that its peak is its
own. Weights are one random block repeated with an offset: rounding and packing do not care, and drawing 4.6 billion numbers would
take longer than all exports. The tokenizer is ../shared/data's.

    python -m benchmarks.export [--variant e2b] [--formats orbax hf_of_orbax hf gguf ...] [--home DIR] [--save]

Needs 30 GB of disk in DIR (by default the directory for temporary files); everything is removed afterwards.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import keep
from benchmarks.worker import peak_gb
from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.canvas import Canvas
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.checkpoint.hf import write_json
from gemma4_jax.checkpoint.hf_export import write_hf
from gemma4_jax.checkpoint.safetensors_io import lay_out, row_blocks
from gemma4_jax.checkpoint.source import of_path
from gemma4_jax.checkpoint.streamed import save_source
from gemma4_jax.config import VARIANTS, ModelConfig
from gemma4_jax.tables import table

CONVERSIONS = ("orbax", "hf_of_orbax")
POLICIES = {"hf": None, "gguf": "q4_0", "compressed-tensors": "w4a16", "mobile": "mobile"}
FORMATS = (*CONVERSIONS, *POLICIES)
TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer_gemma4.model"


def main() -> None:
    """Writes the checkpoint, runs each export, prints one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description="Exports of a real-size model.")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="e2b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--home", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results")
    parser.add_argument("--one", nargs=3, metavar=("FORMAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(*options.one)
        return
    if "hf_of_orbax" in options.formats and "orbax" not in options.formats:
        parser.error("--formats hf_of_orbax reads what orbax writes; name both")
    home, load = Path(tempfile.mkdtemp(dir=options.home)), os.getloadavg()[0]
    try:
        records = [write_checkpoint(options.variant, home / "source")]
        for form in sorted(options.formats, key=FORMATS.index):
            target = home / {"gguf": "target.gguf", "orbax": "ours"}.get(form, "target")
            source = home / ("ours" if form == "hf_of_orbax" else "source")
            command = [sys.executable, "-m", "benchmarks.export", "--one", form, str(source), str(target)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])  # noqa: S603
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(records[-1]), flush=True)
            if form != "orbax":
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    header = ("what", "policy", "GB written", "s", "MB/s read", "peak GiB", "digest s")
    keys = ("what", "policy", "gb", "seconds", "mb_per_s", "peak_gib", "digest_s")
    print(table(header, [tuple(record.get(key) for key in keys) for record in records]))
    if options.save:
        command = f"python -m benchmarks.export --variant {options.variant} --formats {' '.join(options.formats)}"
        keep.save("export", [{"command": command, **record} for record in records], load)


def write_checkpoint(variant: str, directory: Path) -> dict[str, Any]:
    """A Hugging Face directory with random bfloat16 weights."""
    started = time.perf_counter()
    cfg = ModelConfig.variant(variant)
    block = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    entries = {names.TEXT_PREFIX + name: entry for name, entry in names.table(cfg).items()}
    front, places = lay_out({name: ("BF16", entry.shape) for name, entry in entries.items()})
    directory.mkdir()
    with Canvas(directory / "model.safetensors", front, places) as canvas:
        for number, (name, entry) in enumerate(entries.items()):
            for rows in row_blocks(entry.shape, 2):
                count = (rows.stop - rows.start) * int(np.prod(entry.shape[1:], dtype=np.int64))
                start = (number * 7919 + rows.start) % (len(block) // 2)
                canvas.add(name, np.resize(block[start:], count))
    write_json(directory / "config.json", cfg.to_hf())
    size = (directory / "model.safetensors").stat().st_size
    return {"what": "random checkpoint", "gb": size / 1e9, "seconds": time.perf_counter() - started}


def _one(form: str, source: str, target: str) -> None:
    """One conversion or export, in this process; a line of JSON."""
    started = time.perf_counter()
    if form in CONVERSIONS:
        found, place = of_path(source), Path(target)
        if form == "orbax":
            save_source(found, place)
        else:
            write_hf(found, place, requantise=True)
        record: dict[str, Any] = {"policy": "float", "gb": _bytes(place) / 1e9}
        seconds, read = time.perf_counter() - started, _bytes(Path(source))
    else:
        tokenizer = TOKENIZER if form == "gguf" else None
        report = export(source, target, format=form, policy=POLICIES[form], tokenizer=tokenizer)  # pyright: ignore[reportArgumentType]
        seconds, read = report.outcome.seconds, report.outcome.read_bytes
        digest = time.perf_counter() - started - seconds
        record = {"policy": POLICIES[form] or "float", "gb": report.bytes / 1e9, "digest_s": digest}
    peak = (peak_gb() or 0.0) * 1e9 / 2**30
    record |= {"seconds": seconds, "mb_per_s": read / seconds / 1e6, "peak_gib": peak}
    print(json.dumps({"what": form, **record}))


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()

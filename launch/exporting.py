"""`task=export`: a checkpoint becomes a file for other programs, tensor by tensor, with a manifest beside it."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from gemma4_jax.checkpoint.exports import Report, export
from gemma4_jax.checkpoint.load import adapted
from gemma4_jax.checkpoint.peft import export_peft
from gemma4_jax.tables import table
from gemma4_jax.train.metrics import duration, si
from launch.models import tokenizer_beside
from launch.settings import ExportRun


def run_export(run: ExportRun, write: Callable[[str], None] = print) -> None:
    """Writes `export.path` from `export.source`; says what stands on which grid and how far it moved."""
    config = run.export
    if config.format == "peft":
        _adapters(run, write)
        return
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    source, path = settings.pop("source"), settings.pop("path")
    settings["tokenizer"] = config.tokenizer or tokenizer_beside(source)
    if adapted(source):
        write(f"the adapters of {source} are merged into their base")
    if settings["tokenizer"] is None:
        write(f"no tokenizer beside {source}, so none is written")
    if config.policy is not None:
        write(
            f"post-training quantisation: policy {config.policy} is applied to the weights as they are, without training"
        )
    report = export(source, path, **settings)
    write(summary(report))
    write(f"weights: {report.how}; activations: {report.activations}; manifest: {report.manifest}")
    if report.towers is not None:
        write(f"towers: {report.towers}, for llama.cpp's --mmproj")
    outcome = report.outcome
    rate = outcome.read_bytes / max(outcome.seconds, 1e-9)
    write(
        f"wrote {path}: {config.format}, {si(report.bytes)}B in {duration(outcome.seconds)}, {rate / 1e6:,.0f} MB/s of weights read"
    )


def _adapters(run: ExportRun, write: Callable[[str], None]) -> None:
    """The adapters of a run in PEFT's layout."""
    began, config = time.perf_counter(), run.export
    counts = export_peft(config.source, config.path, base=config.base)
    write(table(("adapted", "matrices"), list(counts.items())))
    size = sum(file.stat().st_size for file in Path(config.path).iterdir())
    write(f"wrote {config.path}: peft, {si(size)}B in {duration(time.perf_counter() - began)}")


def summary(report: Report) -> str:
    """One line per grid and storage type."""
    header = ("grid", "stored as", "tensors", "weights", "relative error")
    rows = [
        (grid, label, count, weights, f"{100 * error:.3f} %") for grid, label, count, weights, error in report.rows()
    ]
    return table(header, rows)

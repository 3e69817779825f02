"""Numbers of a run between two log lines, and the line."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from gemma4_jax.train.throughput import peak_memory

Write = Callable[[str], None]


def duration(seconds: float) -> str:
    """`2h05m`, `3m20s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def si(value: float) -> str:
    """`12.3k`, `4.56M`: three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class Meter:
    """Means over the steps since the last log line, weighted by trained tokens, and the speed.

    Device arrays are only kept, not read, until a line is due: reading each step's loss would make the host wait.
    FLOPs are `flops_per_token` of the text model for each token, and what a step says of its towers (`tower_flops`).
    Time spent in evaluation, sampling and saving is left out of the speed. `goodput` is the share of the time since `begun`
    (time.perf_counter; none: now) that went into steps: reading weights, compiling, evaluating and saving are the rest.
    `skipped_in_a_row` is how many updates in a row, up to the last line, were skipped.
    """

    def __init__(self, steps: int, flops_per_token: float, peak_flops: float | None, begun: float | None = None):
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        self._kept: list[Mapping] = []
        self._paused = 0.0
        self.skipped_in_a_row = 0
        self._started = time.perf_counter()
        self._begun = self._started if begun is None else begun
        self._useful = 0.0

    def add(self, metrics: Mapping) -> None:
        """Keeps one step's metrics."""
        self._kept.append(metrics)

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` out of the speed."""
        self._paused += seconds

    def read(self, step: int) -> tuple[dict[str, float], str]:
        """The means since the last call, and the log line; waits for the device."""
        rows = [{name: float(np.asarray(value)) for name, value in row.items()} for row in self._kept]
        self._count_skipped(rows)
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        count = len(rows)
        kept = [
            row for row in rows if not row["skipped"]
        ] or rows  # a step that changed nothing says nothing of the model
        tokens = sum(row["tokens"] for row in kept)
        values = {
            name: sum(row[name] * row["tokens"] for row in kept) / max(tokens, 1e-9)
            for name in ("loss", "ce", "kl", "accuracy", "balance", "max_load", "unused")
            if name in rows[0]
        }
        values["grad_norm"] = sum(row["grad_norm"] for row in kept) / len(kept)
        values["skipped"] = sum(row["skipped"] for row in rows)
        values["learning_rate"] = rows[-1]["learning_rate"]
        values["tokens_per_second"] = sum(row["slots"] for row in rows) / seconds
        values["seconds_per_step"] = seconds / count
        towers = sum(row.get("tower_flops", 0.0) for row in rows) / seconds
        flops = values["tokens_per_second"] * self._flops_per_token + towers
        values["flops_per_second"] = flops
        if self._peak is not None:
            values["mfu"] = flops / self._peak
        self._useful += seconds
        values["goodput"] = self._useful / max(now - self._begun, self._useful)
        values["peak_bytes"] = peak_memory()
        self._kept, self._paused, self._started = [], 0.0, now
        return values, self._line(step, values)

    def _count_skipped(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        speed = f"MFU {values['mfu']:.1%}" if "mfu" in values else f"{si(values['flops_per_second'])}FLOP/s"
        kl = f"  kl {values['kl']:.4f}" if values["kl"] else ""
        experts = f"  load {values['max_load']:.1f}x" if "max_load" in values else ""
        experts += f"  skipped {values['skipped']:.0f}" if values["skipped"] else ""
        left = duration((self._steps - step) * values["seconds_per_step"])
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {values['loss']:.4f}{kl}  "
            f"accuracy {values['accuracy']:.3f}  lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.3g}{experts}  "
            f"{si(values['tokens_per_second'])} tokens/s  {speed}  {values['seconds_per_step']:.3g} s/step  ETA {left}  "
            f"goodput {values['goodput']:.0%}  peak {values['peak_bytes'] / 2**30:.3g} GiB"
        )

"""`python -m launch.report RUN_DIR ...`: one page of what a run did, from the files in its working directory.

Writes RUN_DIR/report.html, which needs nothing else (plots are in it), and RUN_DIR/report.md, which a terminal or an issue shows.
A run that is still going on can be reported as often as you like. Exit code 2 for a directory without metrics.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.errors import UserError
from gemma4_jax.train.recorder import METRICS, SAMPLES
from launch import record, settings

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything a page says."""

    directory: Path
    task: str
    config: dict[str, Any]  # all settings, by dotted name
    changed: dict[str, tuple[Any, Any]]  # those that differ: value, default
    metrics: list[Row]
    samples: list[Row]
    bad_rows: int
    checkpoints: list[int]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, in order."""
        return [(row["step"], row[name]) for row in self.metrics if name in row]

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return self.series(name)[-1][1] if self.series(name) else None

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def attempts(self) -> int:
        """Processes that went on from each other."""
        return len({row["started"] for row in self.metrics if "started" in row}) or 1

    @property
    def seconds(self) -> float | None:
        """From the first start to the last line, times in which nothing ran included."""
        times = [row for row in self.metrics if "time" in row]
        return times[-1]["time"] - min(row["started"] for row in times) if times else None

    @property
    def goodput(self) -> float | None:
        """Share of that time that went into steps whose result is kept: restarts and repeated steps are the rest too."""
        useful, before = 0.0, 0
        for row in self.metrics:
            if "train/seconds_per_step" in row:
                useful += row["train/seconds_per_step"] * (row["step"] - before)
                before = row["step"]
        return None if not self.seconds else min(1.0, useful / self.seconds)


def read(directory: str | os.PathLike[str]) -> Record:
    """What is in a run's working directory; UserError where there is no training run."""
    path = Path(directory)
    if not (path / METRICS).exists():
        raise UserError(f"{path} has no {METRICS}, so it is not the working directory of a training run.")
    metrics = _lines(path / METRICS)
    if not metrics:
        raise UserError(f"{path / METRICS} has no complete line yet; wait for the first train.log_every steps.")
    configs = sorted(path.glob("config_*.json"))
    mapping = json.loads(configs[0].read_text()) if configs else {}
    bad = path / "bad_rows.jsonl"
    return Record(
        directory=path,
        task=mapping.get("task", "training"),
        config=record.flat(mapping),
        changed=record.changed(mapping, _defaults(mapping.get("task"))),
        metrics=metrics,
        samples=_lines(path / SAMPLES),
        bad_rows=len(_lines(bad)),
        checkpoints=sorted(int(step.name) for step in path.glob("checkpoints/[0-9]*") if step.name.isdigit()),
    )


def _lines(path: Path) -> list[Row]:
    """Rows of a JSONL file; a line that a killed process left incomplete is not one."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def _defaults(task: str | None) -> dict[str, Any]:
    """Those of a task; none where this version does not know it, so that a page shows all settings as changed."""
    try:
        return record.known(settings.task_class(task))
    except UserError:
        return {}


def main(arguments: Sequence[str]) -> int:
    """Writes both pages of every directory."""
    from launch.report_page import html, markdown

    parser = argparse.ArgumentParser(prog="python -m launch.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("directories", nargs="+", metavar="RUN_DIR", help="the working directory of a training run")
    parser.add_argument("--output", metavar="DIR", help="where the pages go; none: into the run's directory")
    options = parser.parse_args(arguments)
    if options.output is not None and len(options.directories) > 1:
        parser.error("--output is for one RUN_DIR")
    worst = 0
    for directory in options.directories:
        try:
            run = read(directory)
        except UserError as error:
            print(f"report: {error}", file=sys.stderr)
            worst = 2
            continue
        place = Path(options.output or directory)
        place.mkdir(parents=True, exist_ok=True)
        for name, page in (("report.html", html(run)), ("report.md", markdown(run))):
            partial = place / f".{name}.partial"
            partial.write_text(page)
            partial.replace(place / name)
            print(place / name)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

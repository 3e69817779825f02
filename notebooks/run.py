"""Runs the notebooks, one after the other, and keeps what they show: `python notebooks/run.py [NAME ...] [--output DIR]`.

The executed notebooks and their HTML pages go to DIR (runs/notebooks); the files beside this one stay as they are, without
outputs. Exit code 1 at the first cell that fails, with its error.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

STYLE = "<style>.jp-OutputArea-output pre { font-size: 11px; }</style>"
"""A page 1,200 pixels wide has room for a log line of 140 characters."""


def main(arguments: Sequence[str]) -> int:
    """Runs those whose names contain one of the given words; all without words."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    parser = argparse.ArgumentParser(prog="python notebooks/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all")
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "notebooks", metavar="DIR")
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="of one cell")
    options = parser.parse_args(arguments)
    books = [p for p in sorted(HERE.glob("*.ipynb")) if not options.names or any(n in p.name for n in options.names)]
    if not books:
        parser.error(f"no notebook has {' or '.join(options.names)} in its name")
    options.output.mkdir(parents=True, exist_ok=True)
    settings = Config()
    settings.KernelManager.transport_encryption = "auto"  # else every kernel warns that it talks in the clear
    started, spent = time.perf_counter(), _processor_seconds()
    for path in books:
        began, used = time.perf_counter(), _processor_seconds()
        book = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(HERE)}}
        client = NotebookClient(book, timeout=options.timeout, resources=where, coalesce_streams=True, config=settings)
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        finally:  # what ran is worth looking at, above all where it failed
            nbformat.write(book, options.output / path.name)
            page, _ = HTMLExporter().from_notebook_node(book)
            page = page.replace("</head>", f"{STYLE}</head>", 1)
            (options.output / path.with_suffix(".html").name).write_text(page)
        print(f"{path.name:<22} {_cost(began, used)}{_longest(book)}", flush=True)
    print(f"{len(books)} notebooks: {_cost(started, spent)}; pages in {options.output}")
    return 0


def _cost(began: float, used: float) -> str:
    """Seconds since then, and those of a processor, which other work on the machine hardly changes."""
    return f"{time.perf_counter() - began:4.0f} s, {_processor_seconds() - used:4.0f} s of CPU"


def _processor_seconds() -> float:
    """Of all kernels that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _longest(book: Any) -> str:
    """The cells that took longest, at most three, where they took seconds: `; In [2] 120 s`."""
    seconds = {}
    for cell in book.cells:
        stamps = cell.metadata.get("execution", {})
        first, last = stamps.get("iopub.execute_input"), stamps.get("shell.execute_reply")
        if first and last:
            taken = datetime.fromisoformat(last) - datetime.fromisoformat(first)
            seconds[cell.execution_count] = taken.total_seconds()
    longest = sorted(seconds, key=lambda count: -seconds[count])[:3]
    return "".join(f"; In [{count}] {seconds[count]:.0f} s" for count in longest if seconds[count] >= 5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

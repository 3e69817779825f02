"""Runs the notebooks, one after the other, and keeps what they show: `python notebooks/run.py [NAME ...] [--output DIR]`.

The executed notebooks and their HTML pages go to DIR (runs/notebooks); the files beside this one stay as they are, without
outputs. Exit code 1 at the first cell that fails, with its error.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str]) -> int:
    """Runs those whose names contain one of the given words; all without words."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import HTMLExporter

    parser = argparse.ArgumentParser(prog="python notebooks/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all")
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "notebooks", metavar="DIR")
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="of one cell")
    options = parser.parse_args(arguments)
    books = [p for p in sorted(HERE.glob("*.ipynb")) if not options.names or any(n in p.name for n in options.names)]
    if not books:
        parser.error(f"no notebook has {' or '.join(options.names)} in its name")
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for path in books:
        began = time.perf_counter()
        book = nbformat.read(path, as_version=4)
        client = NotebookClient(book, timeout=options.timeout, resources={"metadata": {"path": str(HERE)}})
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        finally:  # what ran is worth looking at, above all where it failed
            nbformat.write(book, options.output / path.name)
            page, _ = HTMLExporter().from_notebook_node(book)
            (options.output / path.with_suffix(".html").name).write_text(page)
        print(f"{path.name}  {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{len(books)} notebooks in {time.perf_counter() - started:.0f} s; pages in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

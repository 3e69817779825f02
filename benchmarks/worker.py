"""Each side is a process that takes one step for every line it reads, so that the sides can take turns."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from gemma4_jax.errors import UserError

Answer = dict[str, Any]


def serve(facts: Answer, step: Callable[[], float]) -> None:
    """For every line of stdin: a step, then a line of JSON with `facts`, its seconds, its loss and the peak memory."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({**facts, "seconds": seconds, "loss": loss, "peak_gb": peak_gb()}), flush=True)


def peak_gb() -> float | None:
    """Most resident memory in 10^9 bytes; None without /proc. (getrusage would count what the parent held at exec.)"""
    return _status_gb("VmHWM")


def resident_gb() -> float | None:
    """Resident memory now in 10^9 bytes; None without /proc."""
    return _status_gb("VmRSS")


def _status_gb(field: str) -> float | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field)), None)


def add_peers(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """The option `--peer NAME=PYTHON`, as often as wanted."""
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a peer and the bin/python of its environment, as often as wanted; NAME: {', '.join(known)}",
    )


def given_peers(parser: argparse.ArgumentParser, texts: list[str], known: Collection[str]) -> dict[str, Path]:
    """Name -> Python of what `--peer` said, with transformers in front where `make parity` made its environment."""
    peers: dict[str, Path] = {}
    for text in texts:
        name, _, python = text.partition("=")
        if name not in known or not Path(python).is_file():
            parser.error(f"--peer wants NAME=PYTHON, NAME of {', '.join(known)} and PYTHON a file; got {text!r}")
        peers[name] = Path(python)
    if "transformers" not in peers and (found := transformers_python()):
        peers = {"transformers": found, **peers}
    return peers


def transformers_python() -> Path | None:
    """The newest environment that `make parity` made; None, and a line that says so, where there is none."""
    found = sorted(Path(__file__).parents[1].glob(".venv-parity-*/bin/python"))
    if not found:
        print(
            "Without transformers: there is no .venv-parity-*. `make parity` makes it; or name another on the command line."
        )
    return found[-1] if found else None


@contextlib.contextmanager
def worker(python: str, module: str, checkpoint: Path) -> Iterator[Callable[[], Answer]]:
    """A running side; each call of what this yields is one step there."""
    log, command = checkpoint / f"{module}.log", (python, "-m", module, str(checkpoint))
    root, pipe = Path(__file__).parents[1], subprocess.PIPE
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, stderr=stderr) as process,  # noqa: S603
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin.fileno(), process.stdout

        def step() -> Answer:
            with contextlib.suppress(BrokenPipeError):  # the process has ended, and its last words say why
                os.write(stdin, b"\n")
            if not (line := stdout.readline()):
                said = log.read_text().strip().splitlines()[-3:]
                raise UserError(f"{module} stopped; its last words: {' / '.join(said) or 'none'}")
            return json.loads(line)

        try:
            yield step
        finally:
            process.kill()

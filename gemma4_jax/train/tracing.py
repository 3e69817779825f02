"""Profiler traces of single steps: those the settings name, and more whenever somebody asks while the run goes on."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gemma4_jax.errors import UserError
from gemma4_jax.options import option

REQUEST = "profile"
"""A file of this name in the working directory asks for a trace of the next steps, and goes away when it is taken."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Traces of what host and devices do, for TensorBoard's profile tab (`pip install xprof`) and Perfetto."""

    steps: tuple[int, ...] = option((), "first step of each trace, such as 20 or 20,500", may_change=True)
    length: int = option(3, "steps of a trace", may_change=True)
    directory: str | None = option(
        None, "where traces go; none: tensorboard/ in the working directory", may_change=True
    )

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"profile.length is at least 1, got {self.length}.")
        if min(self.steps, default=1) < 1:
            raise UserError(f"profile.steps counts from 1, got {min(self.steps)}.")


def check(config: ProfileConfig, workdir: str | None, steps: int) -> None:
    """UserError for traces that would never be taken, or have no place to go."""
    if config.steps and max(config.steps) > steps:
        raise UserError(f"profile.steps={max(config.steps)} is after the last step, train.steps={steps}.")
    if config.steps and workdir is None and config.directory is None:
        raise UserError("profile.steps wants a place for its traces; set profile.directory or workdir.")


class Tracer:
    """Starts a trace before a step and ends it some steps later. Of several processes, one has one."""

    def __init__(self, config: ProfileConfig, workdir: Path | None, write: Callable[[str], None]):
        self._config, self._workdir, self._write = config, workdir, write
        place = config.directory or (None if workdir is None else workdir / "tensorboard")
        self._place = None if place is None else str(place)
        self._first: int | None = None
        self._looked = 0.0

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """What is dispatched inside is step `number` of a trace, if one is being taken or begins here."""
        if self._first is None and self._place is not None and (number in self._config.steps or self._asked()):
            jax.profiler.start_trace(self._place)
            self._first = number
        if self._first is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, results: Any) -> float:
        """Ends a trace that has its steps, once `results` are there; seconds that this took."""
        if self._first is None or number < self._first + self._config.length - 1:
            return 0.0
        jax.block_until_ready(results)
        began = time.perf_counter()
        self._stop(number)
        return time.perf_counter() - began

    def close(self, number: int) -> None:
        """Ends a trace that the run's end cuts short."""
        if self._first is not None:
            self._stop(number)

    def _stop(self, last: int) -> None:
        jax.profiler.stop_trace()
        self._write(f"profiled steps {self._first} to {last}: tensorboard --logdir {self._place}")
        self._first = None

    def _asked(self) -> bool:
        """Looked for once a second, which costs nothing on a network's file system either."""
        if self._workdir is None or time.monotonic() - self._looked < 1:
            return False
        self._looked = time.monotonic()
        request = self._workdir / REQUEST
        if not request.exists():
            return False
        request.unlink(missing_ok=True)
        return True

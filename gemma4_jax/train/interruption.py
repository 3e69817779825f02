"""What ends a run from outside: the notice that the machine will be taken away, and a step that never ends."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

STALLED = 76
"""Exit code of a run whose watchdog ended it."""


class _Now(Exception):
    """Raised where the run only waits, so that a notice need not wait with it."""


class Notices:
    """Listens for SIGTERM while it is entered as a context.

    Of several processes each may be told, or only one: JAX's preemption service finds a step that none of them has passed, and
    all end after it. A single process ends after the step it is in, or at once where it waits for data.
    """

    def __init__(self):
        self._told = False
        self._waiting = False

    def __enter__(self) -> "Notices":
        self._alone = jax.process_count() == 1
        self._listens = self._alone and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def resumed(self, step: int) -> bool:
        """Whether the run ends before it begins, after `step` that an earlier one did; every process asks once, first of all.

        JAX's service ends a run at the step after the last that any process has asked about. One that asked about nothing yet
        ends at step 1, which a resumed run would never ask about: so it asks about all that are done, a microsecond each.
        """
        return not self._alone and any(self.reached(each) for each in range(1, step + 1))

    def reached(self, step: int) -> bool:
        """Whether the run ends after `step`; every process asks after every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside may be left at any moment; then, or if the notice came before, `interrupted` is True after it."""
        self.interrupted = False
        try:
            self._waiting = True
            if self._told:
                raise _Now
            yield
            self._waiting = False
        except _Now:
            self.interrupted = True
        finally:
            self._waiting = False

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        # A second notice changes nothing: the first is being acted on, and an exit now would lose what is not saved yet.
        first, self._told = not self._told, True
        if first and self._waiting:
            raise _Now


class Watchdog:
    """Ends the process when nothing has happened for `limit` seconds (0: never), with the stack of every thread on stderr.

    A peer that is stopped but alive is not noticed by JAX: all others wait for it in a collective for ever.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._last = time.monotonic()
        self._paused = 0
        self._done = threading.Event()
        self._at = "the first step"

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, at: str) -> None:
        """Something happened; the run now turns to `at`."""
        self._last, self._at = time.monotonic(), at

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside may take as long as it takes."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit / 4)):
            quiet = time.monotonic() - self._last
            if self._paused or quiet < self._limit:
                continue
            print(
                f"launch: nothing has happened for {quiet:.0f} s (train.stall_seconds={self._limit:g}) in {self._at}: a "
                "process that hangs, a stopped peer, or data that do not come; the stacks of all threads follow. Start the "
                "run again to go on from its newest checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(STALLED)

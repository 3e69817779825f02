"""A directory or file that appears whole or not at all: laid out first, filled block by block in any order, renamed at the end."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemma4_jax.errors import UserError


@dataclasses.dataclass
class Canvas:
    """A file whose tensors have their places: name -> (first byte, bytes). Each tensor is filled from its start."""

    path: Path
    front: bytes
    places: dict[str, tuple[int, int]]

    def __post_init__(self):
        self.filled = dict.fromkeys(self.places, 0)
        end = max((start + size for start, size in self.places.values()), default=len(self.front))
        with self.path.open("xb") as opened:
            opened.write(self.front)
            opened.truncate(end)
        self._file = os.open(self.path, os.O_WRONLY)

    def add(self, name: str, values: np.ndarray) -> None:
        """The next values of a tensor, as bytes."""
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
        start, size = self.places[name]
        done = self.filled[name]
        if done + len(data) > size:
            raise ValueError(f"{name} has {size} bytes, got {done + len(data)}")
        self.filled[name] = done + len(data)
        while data:
            written = os.pwrite(self._file, data, start + done)
            data, done = data[written:], done + written

    def __enter__(self) -> "Canvas":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the file; ValueError unless every tensor is complete."""
        os.close(self._file)
        if kind is not None:
            return
        short = [name for name, (_, size) in self.places.items() if self.filled[name] != size]
        if short:
            raise ValueError(f"{self.path} was closed before {short[:3]} were complete")


@contextlib.contextmanager
def beside(target: Path, *, what: str) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it if the block succeeds and removed if it does not.

    Raises:
      UserError: `target` exists (an empty directory does not count), or the disk refuses.
    """
    refuse_existing(target, what)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        _remove(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        _remove(partial)


def refuse_existing(target: Path, what: str) -> None:
    """UserError if there is something at `target` already; an empty directory is nothing."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{what} {str(target)!r} exists; choose another or remove it first.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

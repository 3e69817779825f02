"""Any row of any number of files by its index, read when asked for: only byte offsets are held in memory.

A row is a line (JSONL), a paragraph between blank lines, or a whole file. Blank rows do not count. A byte-order mark, CRLF
and a missing last newline are taken in stride; a line may be as long as memory allows.
"""

import glob
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4_jax.errors import UserError

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """The bytes of a row and where it stands, as `file:line`."""

    where: str
    data: bytes

    @property
    def directory(self) -> Path:
        """Of its file."""
        return Path(self.where.rpartition(":")[0]).parent


class FileRows:
    """Random access to the rows of files: `len(rows)`, `rows[index] -> Row`, iteration. Threads may share one; it pickles.

    Args:
        patterns: files or glob patterns; the files of a pattern are taken in sorted order.
        unit: "line", "paragraph" or "file".

    Raises:
        UserError: a pattern that matches no file, a file that cannot be read, or no rows at all.
    """

    def __init__(self, patterns: Sequence[str], unit: str = "line") -> None:
        self._files = find_files(patterns)
        self._file_of, self._start, self._stop, self._line = array("i"), array("q"), array("q"), array("q")
        for number, path in enumerate(self._files):
            for start, stop, line in _units(path, unit):
                self._file_of.append(number)
                self._start.append(start)
                self._stop.append(stop)
                self._line.append(line)
        if not self._file_of:
            raise UserError(f"There are no rows in {', '.join(map(str, self._files))}: every line is blank.")
        self._handles: dict[int, int] = {}  # file number -> descriptor, opened when first read

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    @property
    def num_bytes(self) -> int:
        """Bytes in all rows: with `len`, a cheap check that data are the same as before."""
        return sum(self._stop) - sum(self._start)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, index: int) -> Row:
        number, start = self._file_of[index], self._start[index]
        if number not in self._handles:
            self._handles[number] = os.open(self._files[number], os.O_RDONLY)
        where = f"{self._files[number]}:{self._line[index]}"
        data = _read_at(self._handles[number], start, self._stop[index] - start)
        if len(data) != self._stop[index] - start:
            raise UserError(
                f"{where}: the file became shorter while it was in use; start again with the finished file."
            )
        return Row(where, data)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and glob patterns name. Raises UserError for a pattern without a file, or an empty file."""
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(pattern))]
        found = [path for path in found if path.is_file()]
        if not found and Path(pattern).is_dir():
            raise UserError(f"The data path {pattern} is a directory; name its files, for example {pattern}/*.jsonl.")
        if not found:
            raise UserError(f"There is no data file at {pattern} (working directory {Path.cwd()}).")
        files.extend(found)
    for path in files:
        if not path.stat().st_size:
            raise UserError(f"The data file {path} is empty.")
    return files


def _units(path: Path, unit: str) -> Iterator[tuple[int, int, int]]:
    """(start byte, stop byte, first line number) of every row of a file, line ends left out."""
    begin, stop, first = -1, 0, 0  # the open paragraph or file; begin -1 while there is none
    for start, end, line in _lines(path):
        blank = start == end
        if unit == "line":
            if not blank:
                yield start, end, line
            continue
        if blank and unit == "paragraph" and begin >= 0:
            yield begin, stop, first
            begin = -1
        if not blank:
            begin, first = (start, line) if begin < 0 else (begin, first)
            stop = end
    if begin >= 0:
        yield begin, stop, first


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """(start byte, stop byte, line number) of every line, without its end; start == stop for a blank one."""
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                skip = len(BOM) if number == 1 and line.startswith(BOM) else 0
                content = len(line[skip:].rstrip()) if line[skip:].strip() else 0
                yield start + skip, start + skip + content, number
                start += len(line)
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({error.strerror}).") from None


def _read_at(handle: int, start: int, length: int) -> bytes:
    """`length` bytes from `start`, fewer only at the end of the file; one call reads at most 2 GiB."""
    parts = []
    while length and (part := os.pread(handle, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return b"".join(parts)

"""Rows of Parquet and ArrayRecord files and of `datasets` directories, as JSON objects by index, as `source.FileRows` has lines.

Tables are columns on disk, and a row out of the middle costs a whole row group. So their rows are written once, in order, as JSON
to a temporary file that is gone with the process, and read from there; keys without a value are left out. Records of ArrayRecord
files are JSON themselves and are read where they lie.
"""

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemma4_jax.data.source import FileRows, Row, find_files
from gemma4_jax.errors import UserError

PARQUET, ARRAY_RECORD = (".parquet",), (".arrayrecord", ".array_record")
BATCH = 1024
"""Rows of a table that are decoded at a time."""


class Rows(Protocol):
    """Rows by index; `FileRows` is one."""

    @property
    def files(self) -> list[Path]: ...
    @property
    def num_bytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def __iter__(self) -> Iterator[Row]: ...
    def close(self) -> None: ...


def open_rows(patterns: Sequence[str], unit: str = "line") -> Rows:
    """The rows of files and glob patterns, in order; a directory may be one that `datasets` saved.

    Raises:
      UserError: as `FileRows`, and for tables that cannot be read or whose package is not installed.
    """
    if not any(is_records(pattern) for pattern in patterns):
        return FileRows(patterns, unit)
    return JoinedRows(patterns, unit)


def is_records(pattern: str) -> bool:
    """Whether a path names tables or records, by its ending or for being a directory."""
    return pattern.endswith((*PARQUET, *ARRAY_RECORD)) or Path(pattern).is_dir()


class JoinedRows:
    """The rows of each pattern, one after the other; `spans` says which are whose."""

    def __init__(self, patterns: Sequence[str], unit: str = "line") -> None:
        self._parts: list[Rows] = [_opened(pattern, unit) for pattern in patterns]
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + len(part))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, behind the last) row of each pattern."""
        return list(zip(self._starts, self._starts[1:], strict=False))

    @property
    def files(self) -> list[Path]:
        return [file for part in self._parts for file in part.files]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        for part, (start, stop) in zip(self._parts, self.spans, strict=True):
            if start <= index < stop:
                return part[index - start]
        raise IndexError(index)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        for part in self._parts:
            part.close()


class TableRows:
    """Rows of tables: of Parquet files, or of the Arrow files that `datasets` saves."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._spool = tempfile.TemporaryFile(prefix="gemma4_jax_rows_")  # noqa: SIM115 - it lives as long as the rows
        self.files = list(files)
        self._stop, self._file_of, self._number = array("q"), array("i"), array("q")
        for index, file in enumerate(self.files):
            for number, content in enumerate(_table_rows(file), 1):
                self._spool.write(_json(content, f"{file}:{number}"))
                self._stop.append(self._spool.tell())
                self._file_of.append(index)
                self._number.append(number)
        self._spool.flush()
        if not self._stop:
            raise UserError(f"There are no rows in {', '.join(map(str, self.files))}.")

    @property
    def num_bytes(self) -> int:
        return self._stop[-1]

    def __len__(self) -> int:
        return len(self._stop)

    def __getitem__(self, index: int) -> Row:
        start = self._stop[index - 1] if index else 0
        data = os.pread(self._spool.fileno(), self._stop[index] - start, start)
        return Row(f"{self.files[self._file_of[index]]}:{self._number[index]}", data)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """The rows are gone; FileRows reads its files again, a table would have to be decoded again."""
        self._spool.close()

    def __del__(self) -> None:
        self.close()


class ArrayRecordRows:
    """Records of ArrayRecord files, each a JSON object; files are best written with `group_size:1`."""

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            from grain.sources import ArrayRecordDataSource

            self._source = ArrayRecordDataSource([str(file) for file in files])
        except ImportError as error:
            raise UserError(
                f"ArrayRecord files need the package array_record ({error}): pip install array_record."
            ) from None
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{files[0]} cannot be read as ArrayRecord ({str(error).splitlines()[0]}).") from None
        self.files = list(files)
        if not len(self):
            raise UserError(f"There are no records in {', '.join(map(str, self.files))}.")

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def __len__(self) -> int:
        return len(self._source)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Row:
        where = self.files[0] if len(self.files) == 1 else self.files[0].parent / "*"
        return Row(f"{where}:{index + 1}", bytes(self._source[index]))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        return None


def _opened(pattern: str, unit: str) -> Rows:
    if Path(pattern).is_dir():
        return TableRows(_saved_files(Path(pattern)))
    if pattern.endswith(PARQUET):
        return TableRows(find_files([pattern]))
    if pattern.endswith(ARRAY_RECORD):
        return ArrayRecordRows(find_files([pattern]))
    return FileRows([pattern], unit)


def _saved_files(directory: Path) -> list[Path]:
    """The Arrow files of a directory that `Dataset.save_to_disk` wrote."""
    splits = directory / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text()).get("splits", [])
        listed = " or ".join(str(directory / name) for name in names)
        raise UserError(f"The data path {directory} holds several splits; name one of them: {listed}.")
    state = directory / "state.json"
    if not state.is_file():
        parquet = sorted(path.relative_to(directory) for path in directory.rglob("*.parquet"))
        hint = f"{directory}/{parquet[0].parent / '*.parquet'}" if parquet else f"{directory}/*.jsonl"
        raise UserError(
            f"The data path {directory} is a directory that `datasets` did not save; name its files, for example {hint}."
        )
    said = json.loads(state.read_text())
    if said.get("_indices_files") or said.get("_indices_data_files"):
        raise UserError(f"{directory} was saved with an index apart; call flatten_indices() before save_to_disk().")
    return [directory / entry["filename"] for entry in said["_data_files"]]


def _table_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is a table, and reading it needs pyarrow: pip install 'gemma4_jax[tables]'.") from None
    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=BATCH):
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            for batch in stream:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as a table ({str(error).splitlines()[0]}).") from None


def _json(content: dict[str, Any], where: str) -> bytes:
    def refuse(value: Any) -> Any:
        if isinstance(value, bytes):
            raise UserError(
                f"{where} holds bytes, which no row of text has; keep pictures and sounds in files, by path."
            )
        return str(value)

    return json.dumps(_without_nothing(content), ensure_ascii=False, default=refuse).encode()


def _without_nothing(value: Any) -> Any:
    """Columns give every struct all keys that any row has; those without a value were not there."""
    if isinstance(value, dict):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value

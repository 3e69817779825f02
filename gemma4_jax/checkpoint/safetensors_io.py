"""The safetensors format: a header that is checked before anything is believed, tensors by blocks of rows.

Layout: little-endian uint64 N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, no holes. The
`safetensors` package is not used because it accepts a name twice (the last wins, so a reviewer and a loader can see
different tensors) and writes only files whose tensors are all in memory at once; the tests compare with it.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.errors import UserError

HEADER_LIMIT = 100_000_000
BLOCK_BYTES = 8 << 20
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes whose values we read and write."""
INTS = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
"""The dtypes of codes and shapes in quantised checkpoints."""
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Every dtype of the format: a file may hold tensors that we only skip."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `start` is the offset in the file of its first byte."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their values in the file's dtype); each block at most 8 MB or one row, overwritten by the next.

        Raises:
          UserError: the dtype is not a float we read, or the file ended early.
        """
        dtype = FLOATS.get(self.dtype)
        if dtype is None:
            raise UserError(
                f"{self.file} stores {self.name} as {self.dtype}; wanted {', '.join(FLOATS)}. Is a quantization_config missing "
                "from config.json?"
            )
        yield from read_blocks(self.file, self.name, self.start, self.shape, dtype)

    def values(self) -> np.ndarray:
        """The whole tensor, floats or integers: for the small ones."""
        dtype = (FLOATS | INTS).get(self.dtype)
        if dtype is None:
            raise UserError(f"{self.file} stores {self.name} as {self.dtype}; wanted {', '.join(FLOATS | INTS)}.")
        out = np.empty(self.shape or (1,), dtype)
        for rows, block in read_blocks(self.file, self.name, self.start, out.shape, dtype):
            out[rows] = block
        return out.reshape(self.shape)


def read_blocks(
    path: Path, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype, step: int | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, values) of the array that lies at byte `start` of a file; each block overwritten by the next.

    A block is at most 8 MB or one row, or `step` rows.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            buffer: np.ndarray | None = None
            for rows in row_blocks(shape, dtype.itemsize, step):
                if buffer is None:
                    buffer = np.empty((rows.stop, *shape[1:]), dtype)
                block = buffer[: rows.stop - rows.start]
                if file.readinto(block.reshape(-1).view(np.uint8)) != block.nbytes:  # pyright: ignore[reportArgumentType]
                    raise UserError(f"{path} ended inside {name}: the file was cut while being read.")
                yield rows, block
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def row_blocks(shape: tuple[int, ...], itemsize: int, step: int | None = None) -> Iterator[slice]:
    """Slices of the first axis that cover it: of `step` rows, else of at most BLOCK_BYTES (but at least one row).

    A scalar is one row.
    """
    shape = shape or (1,)
    row_bytes = max(1, math.prod(shape[1:]) * itemsize)
    step = step or max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, cast where the dtypes differ.

    One side is usually transposed: strips of 32 rows are a cache line wide there, and equal dtypes are copied as integers,
    because numpy moves bfloat16 element by element (2.0 GB/s against 0.3).
    """
    if target.dtype == source.dtype:
        bits = np.dtype(f"u{target.itemsize}")
        target, source = target.view(bits), source.view(bits)
    if target.ndim > 2:
        for inner_target, inner_source in zip(target, source, strict=True):
            copy(inner_target, inner_source)
        return
    for start in range(0, len(target), 32):
        target[start : start + 32] = source[start : start + 32]


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; their bytes are not touched.

    Raises:
      UserError: the file is missing, truncated or longer than its header says, or the header is not exactly what the
        format demands: size cap 100 MB, unique names, known dtypes, byte ranges equal to shape times dtype, no holes, no overlap.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0] if size >= 8 else 0
            if size < 8 or length > size - 8:
                raise UserError(f"{file} is truncated: {size} bytes do not hold its header; fetch the file again.")
            if length > HEADER_LIMIT:
                raise UserError(f"{file} has a header of {length} bytes; at most {HEADER_LIMIT} are read.")
            text = opened.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a safetensors file: {str(error) or 'its header nests too deep'}.") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} is not a safetensors file: its header is no JSON object.")
    header.pop("__metadata__", None)
    tensors = [_entry(file, name, value) for name, value in header.items()]
    end = 0
    for tensor, begin, stop in sorted(tensors, key=lambda entry: entry[1:]):
        if begin != end:
            raise UserError(f"{file} is damaged: {tensor.name} starts at byte {begin} of the data, wanted {end}.")
        end = stop
    found = size - 8 - length
    if found != end:
        what = "truncated" if found < end else "damaged"
        raise UserError(f"{file} is {what}: its tensors need {end} bytes, it holds {found}; fetch the file again.")
    return {tensor.name: dataclasses.replace(tensor, start=8 + length + begin) for tensor, begin, _ in tensors}


def write(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable[[str], np.ndarray]) -> None:
    """Writes a file of one dtype ("F32" ...), tensor by tensor; `read(name)` returns an array or view of that shape.

    Casting goes by blocks of rows, so beside the tensor at hand only 8 MB are in memory.
    """
    target = FLOATS[dtype]
    header, _ = lay_out({name: (dtype, shape) for name, shape in shapes.items()})
    with file.open("wb") as opened:
        opened.write(header)
        for name, shape in shapes.items():
            values = read(name)
            assert values.shape == shape, f"{name}: {values.shape} is not {shape}"
            for rows in row_blocks(shape, max(target.itemsize, values.itemsize)):
                block = np.empty((rows.stop - rows.start, *shape[1:]), target)
                copy(block, np.atleast_1d(values)[rows])
                opened.write(block.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


def lay_out(forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(what stands before the data, {name: (first byte in the file, bytes)}) of a file with these (dtype, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    places = {}
    for name, (dtype, shape) in forms.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = (begin, end - begin)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front = struct.pack("<Q", len(text)) + text
    return front, {name: (len(front) + begin, size) for name, (begin, size) in places.items()}


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = [name for name, _ in pairs if name in seen or seen.add(name)]
        raise ValueError(f"its header has these names twice: {listed(twice)}")
    return found


def _entry(file: Path, name: str, value: Any) -> tuple[Tensor, int, int]:
    """A header's entry with its byte range in the data."""

    def whole(items: Any) -> bool:
        return isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{file} is damaged: the header entry of {name!r} is not dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in BITS if isinstance(dtype, str) else True:
        raise UserError(f"{file} gives {name!r} the dtype {dtype!r}, which the format does not have.")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2:
        raise UserError(
            f"{file} is damaged: shape {shape!r} and offsets {offsets!r} of {name!r} are not whole numbers."
        )
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise UserError(f"{file} is damaged: {name!r} of shape {shape} in {dtype} cannot fill bytes {begin} to {end}.")
    return Tensor(file, name, dtype, tuple(shape), 0), begin, end

"""The GGUF container, version 3: typed metadata, then tensors at aligned places; headers are checked before they are believed.

The `gguf` package is not used, because it writes only tensors that are whole arrays in memory (the per-layer table of E2B has
2.3 billion weights) and reads a vocabulary as a million small arrays (20 s); the tests compare with it, key by key. Source:
ggml/docs/gguf.md.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.checkpoint.ggml_types import GgmlType, known_type
from gemma4_jax.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_STRING, _ARRAY = 8, 9
_BY_NUMBER = {number: kind for kind, (number, _) in _SCALARS.items()} | {_STRING: "str"}


@dataclasses.dataclass(frozen=True)
class Value:
    """A metadata value: kind "u32", "f32", "bool", "str", ... or "[u32]" for an array of them."""

    kind: str
    value: Any


Metadata = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Placed:
    """One tensor of a file: `start` is the offset in the file of its first byte; shape as numpy has it, ggml's reversed."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def lay_out(
    metadata: Metadata, forms: Mapping[str, tuple[GgmlType, tuple[int, ...]]]
) -> tuple[bytes, dict[str, Placed]]:
    """(what stands before the data, where each tensor goes) of a file with these tensors (type, numpy shape)."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(forms), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _typed(value)]
    offset = 0
    placed = []
    for name, (kind, shape) in forms.items():
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.number, offset))
        placed.append(Placed(name, kind, shape, offset))
        offset = _aligned(offset + placed[-1].size)
    front = b"".join(parts)
    front += b"\0" * (_aligned(len(front)) - len(front))
    return front, {tensor.name: dataclasses.replace(tensor, start=len(front) + tensor.start) for tensor in placed}


def read_header(path: Path) -> tuple[Metadata, dict[str, Placed]]:
    """Metadata and tensors of a file; tensor data is not touched.

    Raises:
      UserError: no GGUF file, another version or byte order, truncated, a name twice, a type we do not read, tensors that
        overlap or lie outside the file.
    """
    try:
        with path.open("rb") as opened:
            if opened.read(4) != MAGIC:
                raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


class _Reader:
    """A cursor over the header that cannot leave the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

    def header(self) -> tuple[Metadata, dict[str, Placed]]:
        version, tensor_count, key_count = self.unpack("IQQ")
        if version not in (2, VERSION):
            swapped = struct.unpack("<I", struct.pack(">I", version))[0] in (2, VERSION)
            why = "is big-endian" if swapped else f"has GGUF version {version}"
            raise UserError(f"{self.path} {why}; this version reads little-endian GGUF 2 and 3.")
        metadata: Metadata = {}
        for _ in range(key_count):
            key = self.string()
            if key in metadata:
                raise UserError(f"{self.path} is damaged: it has the key {key!r} twice.")
            metadata[key] = self.value(self.unpack("I")[0], key)
        alignment = metadata.get("general.alignment", Value("u32", ALIGNMENT)).value
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise UserError(f"{self.path} is damaged: general.alignment is {alignment!r}.")
        infos = [self.tensor() for _ in range(tensor_count)]
        start = _aligned(self.at, alignment)
        found: dict[str, Placed] = {}
        for info in infos:
            if info.name in found:
                raise UserError(f"{self.path} is damaged: it has the tensor {info.name!r} twice.")
            found[info.name] = dataclasses.replace(info, start=start + info.start)
        end = start
        for tensor in sorted(found.values(), key=lambda tensor: tensor.start):
            if tensor.start < end or (tensor.start - start) % alignment:
                raise UserError(f"{self.path} is damaged: {tensor.name} overlaps its neighbour or is not aligned.")
            end = tensor.start + tensor.size
        if end > len(self.data):
            raise UserError(
                f"{self.path} is truncated: its tensors end at byte {end}, it has {len(self.data)}; fetch the file again."
            )
        return metadata, found

    def tensor(self) -> Placed:
        name = self.string()
        (dims,) = self.unpack("I")
        if not 1 <= dims <= 4:
            raise UserError(f"{self.path} is damaged: {name!r} has {dims} dims.")
        *reversed_shape, number, offset = self.unpack(f"{dims}QIQ")
        kind = known_type(number, name, str(self.path))
        shape = tuple(reversed(reversed_shape))
        if shape[-1] % kind.block:
            raise UserError(f"{self.path} is damaged: rows of {name}, {shape[-1]} wide, are no blocks of {kind.name}.")
        return Placed(name, kind, shape, offset)

    def value(self, number: int, key: str) -> Value:
        if number == _ARRAY:
            inner, count = self.unpack("IQ")
            kind = _BY_NUMBER.get(inner)
            if kind is None or count > len(self.data):
                raise UserError(f"{self.path} is damaged: {key!r} is an array of {count} of type {inner}.")
            if kind == "str":
                return Value("[str]", [self.string() for _ in range(count)])
            return Value(f"[{kind}]", list(self.unpack(f"{count}{_SCALARS[kind][1]}")))
        kind = _BY_NUMBER.get(number)
        if kind is None:
            raise UserError(f"{self.path} is damaged: {key!r} has the value type {number}.")
        return Value(kind, self.string() if kind == "str" else self.unpack(_SCALARS[kind][1])[0])

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if self.at + length > len(self.data):
            raise self.cut()
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="surrogateescape")

    def unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        if self.at + size > len(self.data):
            raise self.cut()
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += size
        return found

    def cut(self) -> UserError:
        return UserError(f"{self.path} is truncated: its header runs beyond the file's {len(self.data)} bytes.")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    """Type and value."""
    if value.kind == "str":
        return struct.pack("<I", _STRING) + _string(value.value)
    if value.kind == "[str]":
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value.value)) + b"".join(map(_string, value.value))
    if value.kind.startswith("["):
        number, form = _SCALARS[value.kind[1:-1]]
        head = struct.pack("<IIQ", _ARRAY, number, len(value.value))
        return head + np.asarray(value.value, np.dtype(form)).astype(f"<{form}" if form != "?" else "?").tobytes()
    number, form = _SCALARS[value.kind]
    return struct.pack(f"<I{form}", number, value.value)


def _aligned(offset: int, alignment: int = ALIGNMENT) -> int:
    return -(-offset // alignment) * alignment

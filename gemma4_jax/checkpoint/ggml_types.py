"""ggml's storage types: how many bytes a row takes, codes and scales to bytes, bytes to float32.

The bytes are those of ggml's reference quantisers (the tests compare with the `gguf` package); codes come from our grids and are
never computed here. Source: ggml/src/ggml-quants.c and ggml-common.h.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import INT4_SYM7_G32, Q4_0, Q4_0_BF16, Q8_0, BlockGrid

QK = 32
"""Weights per block of Q4_0 and Q8_0."""
QK_K = 256
"""Weights per block of the K types."""


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """A storage type: `block` weights take `size` bytes.

    decode: uint8 [n, size] -> float32 [n, block]. split: the same to (int8 codes [n, block], float16 scales [n, 1]); pack: its
    inverse. float_dtype: of the types that are plain numbers. grids: ours that the type holds exactly, the stricter ones first.
    """

    name: str
    number: int
    block: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    float_dtype: np.dtype | None = None
    grids: tuple[BlockGrid, ...] = ()

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return width // self.block * self.size


def _plain(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    def decode(raw: np.ndarray) -> np.ndarray:
        return raw.view(dtype).astype(np.float32)

    return decode


def _pack_q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float16 d, then 16 bytes: the low nibble is weight j, the high one weight j + 16, both code + 8."""
    unsigned = (codes + np.int8(8)).view(np.uint8)
    out = np.empty((len(codes), 18), np.uint8)
    out[:, :2] = scales.view(np.uint8)
    out[:, 2:] = unsigned[:, :16] | (unsigned[:, 16:] << 4)
    return out


def _split_q4_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate([raw[:, 2:] & 0x0F, raw[:, 2:] >> 4], axis=1).view(np.int8) - np.int8(8)
    return codes, raw[:, :2].copy().view(np.float16)


def _pack_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float16 d, then 32 signed bytes."""
    out = np.empty((len(codes), 34), np.uint8)
    out[:, :2] = scales.view(np.uint8)
    out[:, 2:] = codes.view(np.uint8)
    return out


def _split_q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return raw[:, 2:].view(np.int8).copy(), raw[:, :2].copy().view(np.float16)


def _product(split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable[[np.ndarray], np.ndarray]:
    def decode(raw: np.ndarray) -> np.ndarray:
        codes, scales = split(raw)
        return codes.astype(np.float32) * scales.astype(np.float32)

    return decode


def _decode_q6_k(raw: np.ndarray) -> np.ndarray:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, float16 d; each half of 128 weights alike."""
    low, high = raw[:, :128].reshape(-1, 2, 2, 32), raw[:, 128:192].reshape(-1, 2, 1, 32)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    d = raw[:, 208:].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([low & 0x0F, low >> 4], axis=2)  # [n, half, quarter, 32]
    pairs = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (nibbles | (pairs << 4)).view(np.int8) - np.int8(32)
    return (codes.reshape(-1, 16, 16).astype(np.float32) * (d * scales)[:, :, None]).reshape(-1, QK_K)


F32 = GgmlType("F32", 0, 1, 4, _plain(np.dtype(np.float32)), float_dtype=np.dtype(np.float32))
F16 = GgmlType("F16", 1, 1, 2, _plain(np.dtype(np.float16)), float_dtype=np.dtype(np.float16))
BF16 = GgmlType("BF16", 30, 1, 2, _plain(np.dtype(ml_dtypes.bfloat16)), float_dtype=np.dtype(ml_dtypes.bfloat16))
TYPE_Q4_0 = GgmlType(
    "Q4_0", 2, QK, 18, _product(_split_q4_0), _pack_q4_0, _split_q4_0, grids=(INT4_SYM7_G32, Q4_0_BF16, Q4_0)
)
TYPE_Q8_0 = GgmlType("Q8_0", 8, QK, 34, _product(_split_q8_0), _pack_q8_0, _split_q8_0, grids=(Q8_0,))
TYPE_Q6_K = GgmlType("Q6_K", 14, QK_K, 210, _decode_q6_k)

KNOWN = {kind.number: kind for kind in (F32, F16, BF16, TYPE_Q4_0, TYPE_Q8_0, TYPE_Q6_K)}
_FLOATS = {"float32": F32, "float16": F16, "bfloat16": BF16}
_OTHERS = (
    "3 Q4_1, 6 Q5_0, 7 Q5_1, 9 Q8_1, 10 Q2_K, 11 Q3_K, 12 Q4_K, 13 Q5_K, 15 Q8_K, 16 IQ2_XXS, 17 IQ2_XS, 18 IQ3_XXS, 19 IQ1_S, "
    "20 IQ4_NL, 21 IQ3_S, 22 IQ2_S, 23 IQ4_XS, 24 I8, 25 I16, 26 I32, 27 I64, 28 F64, 29 IQ1_M, 34 TQ1_0, 35 TQ2_0, 39 MXFP4, "
    "40 NVFP4"
)
OTHER_NAMES = {int(number): name for number, name in (pair.split() for pair in _OTHERS.split(", "))}
"""Types we do not read, for the error that says so."""


def float_type(dtype: str) -> GgmlType:
    """The type of plain numbers of this dtype."""
    return _FLOATS[dtype]


def type_for(grid: BlockGrid) -> GgmlType | None:
    """The type that holds the grid's codes and scales as they are; None where ggml has none."""
    return next((kind for kind in KNOWN.values() if any(held.name == grid.name for held in kind.grids)), None)


def known_type(number: int, tensor: str, where: str) -> GgmlType:
    """The type of that number; UserError naming the tensor for one we do not read."""
    if number not in KNOWN:
        name = OTHER_NAMES.get(number, f"number {number}")
        readable = ", ".join(kind.name for kind in KNOWN.values())
        raise UserError(f"{where} stores {tensor} as ggml type {name}; this version reads {readable}.")
    return KNOWN[number]

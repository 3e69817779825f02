"""Small codes in bytes: the first code in the lowest bits, as compressed-tensors and the mobile format have them."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes [..., width] of `bits` bits (2, 4 or 8), stored as code + 2^(bits - 1), to uint8 [..., width * bits / 8].

    Bytes in this order are the little-endian int32 words of compressed-tensors too.
    """
    each = 8 // bits
    unsigned = (codes + np.int8(1 << (bits - 1)) if bits < 8 else codes ^ np.int8(-128)).view(np.uint8)
    parts = unsigned.reshape(*codes.shape[:-1], -1, each)
    out = parts[..., 0].copy()
    for place in range(1, each):
        out |= parts[..., place] << np.uint8(bits * place)
    return out


def unpack(raw: np.ndarray, bits: int) -> np.ndarray:
    """The int8 codes that `pack` was given."""
    each = 8 // bits
    if bits == 8:
        return (raw ^ np.uint8(128)).view(np.int8)
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*raw.shape[:-1], -1).view(np.int8) - np.int8(1 << (bits - 1))

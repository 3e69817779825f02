"""Rows of a weight on their grid: codes and scales for a file, and how far the file's values are from the weights.

Rows are Hugging Face's: blocks run along the last axis. Chunks have one size per row width, so that each grid compiles once
per width and not once per tensor.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.quant.grids import BlockGrid

CHUNK = 1 << 21
"""Weights that are encoded at a time."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """codes: int8 [..., width]. scales: float16 or float32 [..., width / block]. values: float32, codes * scales."""

    codes: np.ndarray
    scales: np.ndarray
    values: np.ndarray


def encode(grid: BlockGrid, rows: np.ndarray, given: np.ndarray | None = None) -> Encoded:
    """Float rows [..., width] of any float dtype on the grid; bit for bit what the forward pass rounds them to (float32).

    given: float32 scales [..., width / block], learned ones; None: those of the grid's rule.
    """
    width = rows.shape[-1]
    grid.check(rows.shape, -1)
    block = grid.block or width
    flat = rows.reshape(-1, block)
    step = min(max(1, CHUNK // block), 1 << max(0, math.ceil(math.log2(max(1, len(flat))))))
    codes = np.empty(flat.shape, np.int8)
    scales = np.empty((len(flat), 1), np.dtype(grid.scale_dtype))
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        padded = part if len(part) == step else np.concatenate([part, np.zeros((step - len(part), block), part.dtype)])
        known = None
        if given is not None:
            known = np.ones((step, 1), np.float32)
            known[: len(part)] = given.reshape(-1, 1)[start : start + step]
        part_codes, part_scales = grid.encode(jnp.asarray(padded), -1, None if known is None else jnp.asarray(known))
        codes[start : start + step] = np.asarray(part_codes)[: len(part)]
        scales[start : start + step] = np.asarray(part_scales)[: len(part)]
    values = decode(codes, scales)
    lead = rows.shape[:-1]
    return Encoded(codes.reshape(rows.shape), scales.reshape(*lead, -1), values.reshape(rows.shape))


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 codes * scales; codes [..., width], scales [..., blocks]. Exact for every grid."""
    blocked = codes.reshape(*scales.shape, -1).astype(np.float32)
    blocked *= scales.astype(np.float32)[..., None]
    return blocked.reshape(codes.shape)


@dataclasses.dataclass
class Drift:
    """How far what a file holds is from the weights: adds up over blocks of rows."""

    blocks: int = 0
    off: int = 0
    error: float = 0.0
    power: float = 0.0

    def add(self, weights: np.ndarray, values: np.ndarray) -> None:
        """The squared error of `values` against the float weights."""
        exact = weights.astype(np.float32)
        difference = (values - exact).ravel()
        exact = exact.ravel()
        self.error += float(np.dot(difference, difference))
        self.power += float(np.dot(exact, exact))

    def compare(self, wanted: np.ndarray, held: np.ndarray, block: int) -> None:
        """Counts blocks of `block` neighbours in which the file's values differ from the ones wanted, in any bit but -0."""
        same = (wanted == held).reshape(-1, block).all(axis=-1)
        self.blocks += same.size
        self.off += int(same.size - np.count_nonzero(same))


def check_finite(values: np.ndarray, name: str, origin: str) -> None:
    """UserError naming the tensor unless every value is a number."""
    # A sum is not finite when a summand is not: one pass without a mask. Overflow of finite ones is told apart after it.
    if np.isfinite(np.sum(values, dtype=np.float64)):
        return
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise UserError(
            f"{origin} has {bad} values in {name} that are NaN, infinite or too large for their grid's scale; nothing was "
            "written. Export an earlier step, or find the step at which they appeared."
        )

"""Arrays of Orbax steps, read where they are indexed and no further."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma4_jax.checkpoint.safetensors_io import BLOCK_BYTES, row_blocks
from gemma4_jax.errors import UserError

CHUNK_CACHE = 1 << 30
"""Bytes of decoded Orbax chunks that stay in memory: a chunk that holds several layers is read once for all of them."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of an Orbax step that is read where it is indexed."""

    opened: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first element, elements) of blocks of rows, in order; for `digest.run_digest`."""
        if not self.shape:
            yield 0, self[()].reshape(-1)
            return
        row, whole = math.prod(self.shape[1:]), self.opened.chunk_layout.read_chunk.shape[0]
        # A chunk is decoded as a whole, and one larger than the cache for every block of it.
        step = max(whole, BLOCK_BYTES // max(1, row * self.dtype.itemsize))
        for rows in row_blocks(self.shape, self.dtype.itemsize, step):
            yield rows.start * row, self[(rows,)].reshape(-1)

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        try:
            return np.ascontiguousarray(self.opened[index].read().result())
        except ValueError as error:
            raise UserError(f"A checkpoint is damaged: {str(error).splitlines()[0][:300]}") from error


def open_stored(directory: Any, name: str) -> Stored:
    """The array of that name of a step. Raises UserError where there is none that can be opened."""
    import tensorstore  # Orbax's own storage library

    base = os.fspath(directory)
    where = base if "://" in base else f"file://{base}"
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{where}/state/", "path": f"{name}/"}}
    try:
        opened: Any = tensorstore.open(spec, open=True, read=True, context=_context()).result()
    except ValueError as error:
        raise UserError(f"{base} is damaged or incomplete: {str(error).splitlines()[0][:300]}") from error
    return Stored(opened, tuple(opened.shape), np.dtype(opened.dtype.numpy_dtype))


def _context() -> Any:
    import tensorstore

    global _CONTEXT
    if _CONTEXT is None:
        _CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": CHUNK_CACHE}})
    return _CONTEXT


_CONTEXT: Any = None

"""Model directories written tensor by tensor: of the model, memory holds one tensor, or some rows of a table, at a time.

Orbax saves arrays that are there. Here a handler of its own takes parameters that are read where they are written, in chunks
as large as what is read at once, so that no chunk is written twice.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from gemma4_jax.checkpoint.digest import run_digest
from gemma4_jax.checkpoint.hf import parameter_dtype, pieces_of
from gemma4_jax.checkpoint.names import Entry
from gemma4_jax.checkpoint.placement import dtype_name
from gemma4_jax.checkpoint.safetensors_io import copy
from gemma4_jax.checkpoint.source import Rows, Source
from gemma4_jax.checkpoint.store import CHUNK, model_meta, write_model
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import abstract

DATA_FILE = 256 << 20
"""Orbax keeps what belongs into one data file in memory until the file is full; by itself it fills 2 GB."""


def can_stream(source: Source) -> bool:
    """Whether the source is a float model: what else belongs to grids is made of whole arrays (`save_model`)."""
    return not (source.grids or source.trained or source.scales)


def save_source(source: Source, path: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike | None = None) -> None:
    """Writes what `save_model` would write of the loaded model, complete or not at all.

    Args:
      source: a float model, see `can_stream`.
      path: a new or empty directory.
      dtype: of the parameters; None: as stored.

    Raises:
      UserError: the directory holds something, or the disk refused.
    """
    if not can_stream(source):
        raise ValueError(f"{source.origin} has grids; load it and use save_model.")
    wanted = dtype_name(dtype)
    pieces = pieces_of(source.cfg, source.tensors)
    dtypes = {parameter: parameter_dtype(parts, wanted) for parameter, parts in pieces.items()}
    state: dict[str, Streamed] = {}

    def form(name: str, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        shape = variable.get_value().shape
        state[f"params.{name}"] = Streamed(shape, dtypes[name], tuple(pieces[name]))
        return jax.ShapeDtypeStruct(shape, dtypes[name])

    model = map_arrays(form, abstract(source.cfg, compute_dtype=wanted or dtypes["embed.w"].name))
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _Handler()))
    write_model(
        path,
        model_meta(model),
        state,
        lambda: {name: run_digest(value.runs()) for name, value in state.items()},
        ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        ocdbt_target_data_file_size=DATA_FILE,
    )


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A parameter made of tensors that are read by blocks of rows."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[Entry, Rows], ...]

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.size * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of what is read and written at once: some rows of a table, else what one tensor fills."""
        entry, _ = self.pieces[0]
        if self._is_table:
            row = self.nbytes // self.shape[0]
            return (min(self.shape[0], max(1, CHUNK // row)), *self.shape[1:])
        return (1,) * len(entry.index) + self.shape[len(entry.index) :]

    @property
    def _is_table(self) -> bool:
        """Whether rows of the one tensor are rows of the parameter."""
        entry, _ = self.pieces[0]
        return len(self.shape) > 1 and not entry.index and entry.inputs is None

    def blocks(self) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """(where, values) in our layout, each chunk once, in order of its first element; overwritten by the next."""
        block = np.empty(self.chunk, self.dtype)
        if self._is_table:
            yield from self._rows(block)
            return
        for entry, tensor in sorted(self.pieces, key=lambda piece: piece[0].index):
            own = block.reshape(self.shape[len(entry.index) :])
            target = np.atleast_1d(entry.view(own))
            for rows, values in tensor.blocks():
                copy(target[rows], values)
            yield entry.index, own

    def _rows(self, block: np.ndarray) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        entry, tensor = self.pieces[0]
        view, start, filled = block.reshape(len(block), *entry.shape[1:]), 0, 0
        for _, values in tensor.blocks():
            while len(values):
                taken = min(len(values), len(block) - filled)
                copy(view[filled : filled + taken], values[:taken])
                values, filled = values[taken:], filled + taken
                if start + filled == self.shape[0] or filled == len(block):
                    yield (slice(start, start + filled),), block[:filled]
                    start, filled = start + filled, 0

    def runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first element, elements) of each block, which lie next to each other in the parameter."""
        place = 0
        for _, block in self.blocks():
            yield place, block.reshape(-1)
            place += block.size


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes one chunk after the other; what it wrote is an array like any other."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """A future that writes: Orbax makes the directory meanwhile, and says so to futures alone."""
        return [CommitFutureAwaitingContractedSignals(_write(values, infos, args), name="streamed")]


async def _write(values: Sequence[Streamed], infos: Sequence[Any], args: Sequence[Any]) -> None:
    import tensorstore  # Orbax's own storage library

    for value, info, arg in zip(values, infos, args, strict=True):
        await info.await_path_creation()
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=value.shape,
            local_shape=value.chunk,
            dtype=value.dtype,
            process_index=jax.process_index(),
            arg=arg,
        )
        opened: Any = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
        for where, block in value.blocks():
            await opened[where].write(block)

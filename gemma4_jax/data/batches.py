"""A Grain dataset of batches whose place is two integers, so a run resumes exactly, on any number of processes.

The plan is global. Grain shuffles all rows of an epoch, the rows are cut into windows, and a window's examples are packed
into sequences; process p of n takes its share of each global batch. All processes therefore yield equally many batches,
no matter how their rows pack, and the order depends on the global batch size only, not on how many processes share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from gemma4_jax.data.pack import Batch, best_fit, collate
from gemma4_jax.data.rows import RowTable
from gemma4_jax.errors import UserError

Piece = tuple[int, int]  # (row, piece of it)


@dataclass(frozen=True)
class Plan:
    """What goes into which sequence, window by window.

    Args:
        table: lengths of rows.
        seq_len: slots of a sequence.
        window: rows packed together; an epoch's last window may be smaller.
        packing: several examples to a sequence, or one.
        shuffle: another order in each epoch, or the order of the files.
        epochs: passes over the rows, None for no end.
    """

    table: RowTable
    seq_len: int
    window: int
    packing: bool
    shuffle: bool
    seed: int
    epochs: int | None

    @property
    def windows_per_epoch(self) -> int:
        return -(-len(self.table) // self.window)

    @property
    def num_windows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.windows_per_epoch

    def order(self, window: int) -> list[int]:
        """Row indices of a window."""
        dataset = grain.MapDataset.range(len(self.table)).seed(self.seed)
        if self.shuffle:
            dataset = dataset.shuffle()
        dataset = dataset.repeat()
        epoch, number = divmod(window, self.windows_per_epoch)
        start = epoch * len(self.table)
        stop = start + min((number + 1) * self.window, len(self.table))
        rows = (dataset[index] for index in range(start + number * self.window, stop))
        return [row for row in rows if row is not None]  # None is Grain's mark for a filtered row; here is no filter

    def sequences(self, window: int) -> list[list[Piece]]:
        """The sequences of a window, each a list of pieces; skipped rows are in none."""
        pieces: list[Piece] = []
        lengths: list[int] = []
        for row in self.order(window):
            length = self.table.length(row)
            for number, start in enumerate(range(0, length, self.seq_len)):
                pieces.append((row, number))
                lengths.append(min(length - start, self.seq_len))
        if not self.packing:
            return [[piece] for piece in pieces]
        groups = best_fit(lengths, self.seq_len)
        if self.shuffle:  # best fit puts the longest examples into the first sequences
            np.random.default_rng([self.seed, window]).shuffle(groups)
        return [[pieces[index] for index in group] for group in groups]


class BatchDataset(grain.IterDataset[Batch]):
    """The batches of one process. The last batch of all is filled up with sequences of padding."""

    def __init__(self, plan: Plan, batch_size: int, pad: int, process_index: int, process_count: int) -> None:
        super().__init__()
        self.plan = plan
        self.batch_size = batch_size
        self.pad = pad
        self.process_index = process_index
        self.process_count = process_count

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator(grain.DatasetIterator[Batch]):
    """State: the window, and how many of its sequences have been handed out, to all processes together."""

    def __init__(self, dataset: BatchDataset) -> None:
        super().__init__()
        self._dataset = dataset
        self._window = 0
        self._taken = 0
        self._sequences: tuple[int, list[list[Piece]]] | None = None  # the window at hand

    def __next__(self) -> Batch:
        dataset = self._dataset
        sequences = self._take(dataset.batch_size * dataset.process_count)
        if not sequences:
            raise StopIteration
        start = dataset.process_index * dataset.batch_size
        own = sequences[start : start + dataset.batch_size]
        own += [[]] * (dataset.batch_size - len(own))
        table, seq_len = dataset.plan.table, dataset.plan.seq_len
        examples = [[table.tokens(row).piece(number, seq_len) for row, number in pieces] for pieces in own]
        return collate(examples, seq_len, dataset.pad)

    def get_state(self) -> dict[str, Any]:
        return {"window": self._window, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._window, self._taken = int(state["window"]), int(state["taken"])

    def _take(self, count: int) -> list[list[Piece]]:
        """The next `count` sequences, fewer only at the end of the last epoch."""
        plan = self._dataset.plan
        taken: list[list[Piece]] = []
        empty = 0  # windows in a row without a sequence
        while len(taken) < count and self._window != plan.num_windows:
            if self._sequences is None or self._sequences[0] != self._window:
                self._sequences = (self._window, plan.sequences(self._window))
            sequences = self._sequences[1]
            new = sequences[self._taken : self._taken + count - len(taken)]
            taken += new
            self._taken += len(new)
            if self._taken >= len(sequences):
                self._window, self._taken = self._window + 1, 0
                empty = 0 if sequences else empty + 1
                if empty >= plan.windows_per_epoch:
                    raise UserError("A whole pass over the data gave no usable row.")
        return taken


def count_sequences(plan: Plan, windows: range) -> Iterator[tuple[int, int]]:
    """(sequences, filled slots) of each window."""
    for window in windows:
        sequences = plan.sequences(window)
        lengths = (plan.table.length(row) - number * plan.seq_len for pieces in sequences for row, number in pieces)
        yield len(sequences), sum(min(length, plan.seq_len) for length in lengths)

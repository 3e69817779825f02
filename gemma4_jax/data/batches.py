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

from gemma4_jax.data.media import MediaLayout
from gemma4_jax.data.pack import Batch, best_fit, collate
from gemma4_jax.data.rows import RowTable
from gemma4_jax.errors import UserError
from gemma4_jax.media.batch import MediaShape

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
        mixture: (first row, behind the last, weight) of each part; none: every row once in an epoch. An epoch of a mixture is as
            many rows as there are, of each part as its weight says: some rows several times, others not yet.
    """

    table: RowTable
    seq_len: int
    window: int
    packing: bool
    shuffle: bool
    seed: int
    epochs: int | None
    mixture: tuple[tuple[int, int, float], ...] = ()

    @property
    def windows_per_epoch(self) -> int:
        return -(-len(self.table) // self.window)

    @property
    def num_windows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.windows_per_epoch

    def order(self, window: int) -> list[int]:
        """Row indices of a window."""
        dataset = self._endless()
        epoch, number = divmod(window, self.windows_per_epoch)
        start = epoch * len(self.table)
        stop = start + min((number + 1) * self.window, len(self.table))
        rows = (dataset[index] for index in range(start + number * self.window, stop))
        return [row for row in rows if row is not None]  # None is Grain's mark for a filtered row; here is no filter

    def _endless(self) -> "grain.MapDataset[int]":
        """All rows again and again; which row is where depends on nothing but the plan, so a place in it is one number."""

        def part(start: int, stop: int, seed: int) -> "grain.MapDataset[int]":
            dataset = grain.MapDataset.range(start, stop).seed(seed)
            return (dataset.shuffle() if self.shuffle else dataset).repeat()

        if not self.mixture:
            return part(0, len(self.table), self.seed)
        parts = [part(start, stop, self.seed + index) for index, (start, stop, _) in enumerate(self.mixture)]
        return grain.MapDataset.mix(parts, weights=[weight for *_, weight in self.mixture])

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
    """The batches of one process, of `batch_size` sequences each. The last batch of all is filled up with sequences of padding.

    All batches have room for the media that the fullest batch of the first window has; one that needs more has room for the next
    round number. So nearly all are of one shape, the same for every process, and wherever a run resumes.
    """

    def __init__(
        self,
        plan: Plan,
        batch_size: int,
        pad: int,
        process_index: int,
        process_count: int,
        layout: MediaLayout = MediaLayout(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.plan = plan
        self.batch_size = batch_size
        self.pad = pad
        self.process_index = process_index
        self.process_count = process_count
        self.layout = layout
        self.room = MediaShape()
        if layout.sees:
            first, size = plan.sequences(0), batch_size * process_count
            for start in range(0, len(first), size):
                self.room |= self.needed(first[start : start + size])

    def needed(self, sequences: list[list[Piece]]) -> MediaShape:
        """Round room for the media of a global batch: of the fullest micro-batch of the fullest process."""
        table, needed = self.plan.table, MediaShape()
        for start in range(0, len(sequences), self.batch_size):
            for members in self.layout.micro_batches(sequences[start : start + self.batch_size]):
                parts = [table.media(row) for pieces in members for row, _ in pieces]
                needed |= sum(parts, MediaShape())
        return needed.rounded(self.layout.multiple_of) if needed else needed

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
        batch = collate(examples, seq_len, dataset.pad)
        room = dataset.room | dataset.needed(sequences)
        if room:
            share = dataset.process_index, dataset.process_count
            batch["media"] = dataset.layout.collate(examples, seq_len, room, share)
        return batch

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

"""What training will see, counted before step 1: rows, tokens, how full the sequences are, what was skipped and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma4_jax.data.batches import Plan, count_sequences
from gemma4_jax.data.pack import best_fit
from gemma4_jax.data.rows import RowTable
from gemma4_jax.errors import UserError
from gemma4_jax.media.batch import MediaShape
from gemma4_jax.tables import near


@dataclass(frozen=True)
class Summary:
    """Counts of one epoch. With `estimated` they are scaled up from `checked` rows.

    Attributes:
        rows: rows in the files. checked: rows looked at. examples: usable rows, or their pieces where text was cut.
        tokens: slots the examples take. trained_tokens: targets that count in the loss.
        sequences: packed sequences. fill: share of their slots that is taken.
        batches: global batches. skipped: reason -> checked rows. first_bad: reason -> the first such row, as a sentence.
        notes: remark -> checked rows it is true of. media: room for pictures and sounds in a micro-batch of each process.
        mixture: what comes from which path, a line each.
    """

    files: tuple[str, ...]
    rows: int
    checked: int
    examples: int
    tokens: int
    trained_tokens: int
    sequences: int
    seq_len: int
    fill: float
    batches: int
    skipped: dict[str, int]
    first_bad: dict[str, str]
    notes: dict[str, int]
    media: MediaShape = MediaShape()  # noqa: RUF009  # frozen
    mixture: tuple[str, ...] = ()

    @property
    def estimated(self) -> bool:
        return self.checked < self.rows

    @property
    def trained(self) -> float:
        """Share of tokens that is trained."""
        return self.trained_tokens / self.tokens

    def table(self) -> str:
        """A few aligned lines for a person."""
        more = f" and {len(self.files) - 3} more" if len(self.files) > 3 else ""
        about = "about " if self.estimated else ""
        how = f"estimated from {self.checked:,}" if self.estimated else "all checked"
        lines = [
            ("files", ", ".join(near(self.files[:3])) + more),
            ("rows", f"{self.rows:,} ({how})"),
            ("examples", f"{about}{self.examples:,}"),
            ("tokens", f"{about}{self.tokens:,}, {self.trained:.1%} of them trained"),
            ("sequences", f"{about}{self.sequences:,} of {self.seq_len:,} slots, {self.fill:.1%} full"),
            ("batches", f"{about}{self.batches:,} an epoch"),
        ]
        if self.media:
            lines.append(("media", f"a batch has room for {self.media.described()}"))
        lines += [("mixture" if not index else "", text) for index, text in enumerate(self.mixture)]
        counts = Counter(self.skipped)
        total = f"{counts.total():,} of {self.checked:,} checked rows"
        lines.append(("skipped", total if counts else "none"))
        lines += [
            ("", f"{count:,} {reason}; first: {self.first_bad[reason]}") for reason, count in counts.most_common()
        ]
        lines += [("note", f"{count:,} rows {note}") for note, count in self.notes.items()]
        return "\n".join(f"  {name:<10} {text}" for name, text in lines)


def summarise(plan: Plan, files: Sequence[str], global_batch: int, check_rows: int) -> Summary:
    """Looks at every row, or at `check_rows` of them spread evenly over a larger number, and counts.

    Raises:
        UserError: no row looked at can be used, or fewer than the table allows.
    """
    table = plan.table
    checked = [
        int(row) for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), check_rows)).astype(np.int64))
    ]
    lengths = [table.length(row) for row in checked]
    tokens = sum(lengths)
    if not tokens:
        raise UserError(_nothing_usable(table, files, len(checked)))
    if table.known:
        counts = list(count_sequences(plan, range(plan.windows_per_epoch)))
        sequences, filled = sum(count for count, _ in counts), sum(filled for _, filled in counts)
    else:
        sequences, filled = _pack_sample(plan, lengths)
    table.refuse_too_many_bad()
    scale = len(table) / len(checked)
    return Summary(
        files=tuple(files),
        rows=len(table),
        checked=len(checked),
        examples=round(scale * sum(-(-length // plan.seq_len) for length in lengths)),
        tokens=round(scale * tokens),
        trained_tokens=round(scale * sum(table.trained(row) for row in checked)),
        sequences=max(1, round(scale * sequences)),
        seq_len=plan.seq_len,
        fill=filled / (sequences * plan.seq_len),
        batches=max(1, -(-round(scale * sequences) // global_batch)),
        skipped=dict(table.skipped),
        first_bad=dict(table.first_bad),
        notes=dict(table.notes),
    )


def _pack_sample(plan: Plan, lengths: Sequence[int]) -> tuple[int, int]:
    """(sequences, filled slots) of some rows of these lengths."""
    pieces = [min(length - start, plan.seq_len) for length in lengths for start in range(0, length, plan.seq_len)]
    sequences = len(best_fit(pieces, plan.seq_len)) if plan.packing else len(pieces)
    return sequences, sum(pieces)


def _nothing_usable(table: RowTable, files: Sequence[str], checked: int) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in table.skipped.most_common())
    first = next(iter(table.first_bad.values()))
    return f"None of the {checked:,} rows checked in {', '.join(files)} can be used ({reasons}). The first: {first}"

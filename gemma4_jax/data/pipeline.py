"""The settings of the data, and the loader that serves batches of them."""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gemma4_jax.data.chat import BadRow, RowEncoder
from gemma4_jax.data.pack import Batch
from gemma4_jax.data.records import JoinedRows, Rows, is_records, open_rows
from gemma4_jax.data.rows import RowTable
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.options import option
from gemma4_jax.processor import Processor

if TYPE_CHECKING:
    from grain import DatasetIterator

    from gemma4_jax.data.summary import Summary

Kind = Literal["chat", "qa", "text"]
Document = Literal["file", "paragraph", "line"]
TrainOn = Literal["assistant", "last"]
OnBadRow = Literal["skip", "error"]


@dataclass(frozen=True)
class DataConfig:
    """Which rows, and how they become batches.

    `kind` "chat": {"messages": [...], "tools": [...]}. "qa": `prompt_field` and `response_field`, a chat of two turns. Rows are
    lines of JSON, rows of Parquet files or of a directory that `datasets` saved, or JSON records of ArrayRecord files. "text": the
    `text_field` of such rows (JSON for files named .jsonl), else plain text whose documents are files, paragraphs (between blank
    lines) or lines; every token is trained, and a document longer than a sequence is cut into pieces.
    """

    paths: str | tuple[str, ...] = option(help="files or glob patterns, separated by commas or as a tuple")
    weights: tuple[float, ...] | None = option(
        None, "a mixture: how much of what is read comes from each of the paths; none: as much as each has rows"
    )
    kind: Kind = option("chat", "what a row is: a chat, question and answer fields, or text")
    seq_len: int = option(2048, "tokens in a sequence")
    batch_size: int = option(8, "sequences in a batch, over all devices and processes")
    packing: bool = option(True, "several examples to a sequence")
    shuffle: bool = option(True, "another order of rows in each epoch")
    seed: int = option(0, "of the order of rows")
    epochs: int | None = option(None, "passes over the rows; none: no end", may_change=True)
    train_on: TrainOn = option("assistant", "every assistant message, or only those of the last model turn")
    enable_thinking: bool = option(False, "write the chats with thinking on, and train on their thoughts")
    on_bad_row: OnBadRow = option("skip", "count a row that cannot be used, or stop at it")
    max_bad: float = option(0.5, "share of rows that cannot be used above which the run ends", may_change=True)
    prompt_field: str = option("question", 'of kind "qa"')
    response_field: str = option("answer", 'of kind "qa"')
    text_field: str = option("text", 'of kind "text" in JSONL files')
    document: Document = option("file", "what a document is in plain text files")
    split_long: bool = option(True, "cut long text into pieces; off: a text longer than seq_len is a bad row")
    pack_window: int = option(8192, "rows packed together")
    check_rows: int = option(20_000, "rows to count before step 1; of more rows, so many are sampled", may_change=True)
    cache_mb: int = option(512, "memory for tokenised rows", may_change=True)
    prefetch: int = option(2, "batches made ahead by a thread; 0: none", may_change=True)

    def __post_init__(self) -> None:
        paths = self.paths.split(",") if isinstance(self.paths, str) else self.paths
        object.__setattr__(self, "paths", tuple(path.strip() for path in paths))
        if not all(self.paths):
            raise UserError("data.paths names the files to read; one of them is empty.")
        for name, kind in (("kind", Kind), ("document", Document), ("train_on", TrainOn), ("on_bad_row", OnBadRow)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise UserError(f"data.{name} is {value!r}; {did_you_mean(str(value), get_args(kind))}.")
        least = {"seq_len": 2, "batch_size": 1, "pack_window": 1, "check_rows": 1, "cache_mb": 0, "prefetch": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"data.{name} is at least {minimum}, got {getattr(self, name)}.")
        if self.weights is not None and (len(self.weights) != len(self.paths) or min(self.weights, default=0.0) <= 0):
            raise UserError(
                f"data.weights wants a number above 0 for each of the {len(self.paths)} data.paths, got {self.weights}."
            )
        if not 0.0 <= self.max_bad <= 1.0:
            raise UserError(f"data.max_bad is a share from 0 to 1, got {self.max_bad}.")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"data.epochs is none or at least 1, got {self.epochs}.")
        if self.kind == "text":
            _ = self.text_is_json  # refuses a mixture

    @property
    def text_is_json(self) -> bool:
        """Text stands in rows of objects. Raises UserError when some does and some does not."""
        json_lines = {path.endswith((".jsonl", ".json")) or is_records(path) for path in self.paths}
        if len(json_lines) > 1:
            raise UserError(f"data.paths mixes JSONL and plain text: {', '.join(self.paths)}; convert one of them.")
        return json_lines == {True}


class Loader(Iterator[Batch]):
    """Batches (see `pack.collate`, and `media.MediaLayout` for "media") of one process, with a state that resumes exactly.

    Attributes:
        summary: what the data are, counted before the first batch.
        rows: what came of each row.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        process_index: int = 0,
        process_count: int = 1,
        quarantine: Path | None = None,
        parts: int = 1,
        multiple_of: int = 1,
    ) -> None:
        """Indexes the files and counts rows. Use `make_loader`."""
        from grain.experimental import ThreadPrefetchIterDataset  # with grain, a second to import: not for a --help

        from gemma4_jax.data.batches import BatchDataset, Plan
        from gemma4_jax.data.media import MediaLayout
        from gemma4_jax.data.summary import summarise

        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index runs from 0 to {process_count - 1}, got {process_index}.")
        if config.batch_size % process_count:
            raise UserError(
                f"data.batch_size={config.batch_size} cannot be shared out over {process_count} processes; choose a multiple."
            )
        line_rows = config.kind != "text" or config.text_is_json
        unit = "line" if line_rows else config.document
        source = open_rows(config.paths, unit) if config.weights is None else JoinedRows(config.paths, unit)
        self.rows = table = RowTable(
            source,
            RowEncoder(config, processor),
            raise_bad=config.on_bad_row == "error",
            cache_bytes=config.cache_mb << 20,
            max_bad=config.max_bad,
            on_bad=_quarantine(quarantine),
        )
        mixture = _mixture(source, config.weights)
        self._plan = Plan(
            *(table, config.seq_len, config.pack_window, config.packing, config.shuffle, config.seed, config.epochs),
            mixture=mixture,
        )
        self._batch_size = config.batch_size
        files = [str(path) for path in source.files]
        self.summary: Summary = summarise(self._plan, files, config.batch_size, config.check_rows)
        # What decides which example is where: a state is good only for data where all of it is the same.
        self._identity = {
            "rows": len(source),
            "bytes": source.num_bytes,
            "global_batch": config.batch_size,
            **{name: getattr(config, name) for name in _ORDER_FIELDS},
            "vocab_size": processor.vocab_size,
            **_reading(processor),
            **({"mixture": [list(part) for part in mixture]} if mixture else {}),
        }
        pad = processor.tokenizer.special.pad
        layout = MediaLayout.of(processor.front_end, parts, multiple_of)
        share = config.batch_size // process_count
        batches = BatchDataset(self._plan, share, pad, process_index, process_count, layout)
        self.summary = replace(self.summary, media=batches.room, mixture=_shares(config.paths, mixture))
        # A list of one, emptied by `close`: Grain's iterator must be gone before the interpreter takes its modules down,
        # or it complains; the finalizer sees to that when nobody calls `close`.
        self._open = [iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch))]
        self._close = weakref.finalize(self, _close, self._open)
        self._start = self._iterator.get_state()

    @property
    def _iterator(self) -> "DatasetIterator[Batch]":
        if not self._open:
            raise ValueError("This Loader has been closed; make another one.")
        return self._open[0]

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def num_batches(self) -> int | None:
        """Batches from the first to the last, None when there is no end or not every row has been looked at."""
        from gemma4_jax.data.batches import count_sequences

        windows = self._plan.num_windows
        if windows is None or not self._plan.table.known:
            return None
        return -(-sum(count for count, _ in count_sequences(self._plan, range(windows))) // self._batch_size)

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, for `restore`; JSON, the same on every process."""
        return {"at": dict(self._iterator.get_state()), "data": dict(self._identity)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, in this or another process, also with another number of processes.

        Raises:
            UserError: the state belongs to other data or other settings; names what differs.
        """
        saved = state["data"]
        keys = [key for key in self._identity if saved.get(key) != self._identity[key]]
        if keys:
            changes = ", ".join(f"{key} was {saved.get(key)!r} and is {self._identity[key]!r}" for key in keys)
            raise UserError(f"The data cannot go on where the checkpoint stopped: {changes}.")
        self._iterator.set_state(dict(state["at"]))

    def reset(self) -> None:
        """Back to the first batch."""
        self._iterator.set_state(dict(self._start))

    def close(self) -> None:
        """Stops the prefetching thread; the loader cannot be used afterwards."""
        self._close()


_ORDER_FIELDS = (
    *("kind", "seq_len", "packing", "shuffle", "seed", "train_on", "enable_thinking", "on_bad_row"),
    *("prompt_field", "response_field", "text_field", "document", "split_long", "pack_window"),
)


def _mixture(source: Rows, weights: Sequence[float] | None) -> tuple[tuple[int, int, float], ...]:
    """Rows and weight of each path of a mixture; empty without weights."""
    if weights is None or not isinstance(source, JoinedRows):
        return ()
    return tuple((start, stop, weight) for (start, stop), weight in zip(source.spans, weights, strict=True))


def _shares(paths: Sequence[str], mixture: Sequence[tuple[int, int, float]]) -> tuple[str, ...]:
    """A line for each part of a mixture."""
    total, rows = sum(weight for *_, weight in mixture), sum(stop - start for start, stop, _ in mixture)
    return tuple(
        f"{path}: {weight / total:.1%}; {stop - start:,} rows, each {weight / total * rows / (stop - start):.3g} times an epoch"
        for path, (start, stop, weight) in zip(paths, mixture, strict=bool(mixture))
    )


def _reading(processor: Processor) -> dict[str, Any]:
    """How media are read, which decides how many tokens they take; nothing of a processor for text."""
    front_end = processor.front_end
    if front_end.vision is None and front_end.audio is None:
        return {}
    return {f"media.{name}": getattr(front_end.config, name) for name in _READING_FIELDS}


_READING_FIELDS = ("image_tokens", "frame_tokens", "num_frames", "listen")


def _close(iterators: "list[DatasetIterator[Batch]]") -> None:
    while iterators:
        iterators.pop().close()


def _quarantine(path: Path | None) -> Callable[[BadRow], None]:
    """Writes every bad row's place and reason to a JSONL file, which is begun anew."""
    if path is None:
        return lambda _row: None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a file that is there has rows in it

    def write(row: BadRow) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"reason": row.reason, "message": str(row)}) + "\n")

    return write


def make_loader(
    config: DataConfig,
    processor: Processor,
    *,
    process_index: int = 0,
    process_count: int = 1,
    quarantine: Path | None = None,
    parts: int = 1,
    multiple_of: int = 1,
) -> Loader:
    """The share of process `process_index` of `process_count` in each batch of `config.batch_size` sequences.

    The last batch of a finite number of epochs is filled up with padding (weight 0), so nothing is dropped and all processes
    yield equally many. For evaluation: `epochs=1, shuffle=False`, and `reset()` before each pass. Rows that cannot be used are
    written to `quarantine` as they are met, each with its place and what is wrong with it. Media are laid out for `parts`
    micro-batches of a step, and padded to a multiple of `multiple_of`, the process's devices that share out a batch.

    Raises:
        UserError: a file is missing or empty, too many rows are not usable, or (on_bad_row="error") some row is not.
    """
    return Loader(
        config,
        processor,
        process_index=process_index,
        process_count=process_count,
        quarantine=quarantine,
        parts=parts,
        multiple_of=multiple_of,
    )


@contextmanager
def held_out(config: DataConfig, processor: Processor) -> Iterator[Loader]:
    """The rows once, in file order; `reset()` begins anew. Closed at the end.

    Raises UserError as `make_loader` does.
    """
    loader = make_loader(replace(config, epochs=1, shuffle=False), processor)
    try:
        yield loader
    finally:
        loader.close()

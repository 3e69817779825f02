"""What a teacher says of the rows of a run, found once and kept on disk: its likeliest tokens at every trained position.

A run that trains from such a record needs no teacher beside it, neither its weights nor its forward pass, and runs on the same
rows (another policy, another learning rate) share it. A row is known by what the teacher reads of it and where it is trained, so
that neither the order of rows nor the number of processes matters.

A directory holds `teacher.json`, which says whose answers these are, and for each process that wrote two files that only grow:
`answers-*.bin`, and `rows-*.bin`, whose entries say where in the former a row's answer lies. Data are written first, so that an
entry without its answer is never found, also not by who comes after a kill.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.kernels.cross_entropy import LEAST_REST, Likeliest, default_chunk
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import batch_share, place_batch
from gemma4_jax.train.metrics import Write, duration, si

ENTRY = np.dtype([("row", "V16"), ("start", "<i8"), ("count", "<i4")])
"""A digest of the row, the place of its first trained position in the answers, and how many there are."""

SECONDS = 10.0
"""Between two lines of progress."""


class Answers:
    """The record of one teacher in a directory, made if it is not there.

    Each trained position takes 6 bytes a token and 2 for the others: int32 ids and float16 log-probabilities.
    """

    def __init__(self, directory: str | os.PathLike[str], about: Mapping[str, Any], *, top_k: int, writer: int = 0):
        """`about`: what tells this teacher from others, as JSON, and for the eye its name as `teacher`; `writer`: which process
        this is.

        Raises UserError where another teacher's answers, or those of another number of tokens, lie.
        """
        self.directory, self.top_k, self._writer = Path(directory), top_k, writer
        self._position = np.dtype([("ids", "<i4", (top_k,)), ("log_p", "<f2", (top_k + 1,))])
        self._check({**about, "top_k": top_k})
        self._entries: dict[bytes, tuple[Path, int, int]] = {}
        self._maps: dict[Path, np.ndarray] = {}
        for index in sorted(self.directory.glob("rows-*.bin")):
            self._read(index)

    def __contains__(self, row: bytes) -> bool:
        return row in self._entries

    def add(self, rows: list[bytes], said: Likeliest, trained: np.ndarray) -> None:
        """Writes the answers to the trained positions, bool [B, T], of rows that are not there yet."""
        answers, index = (self.directory / f"{name}-{self._writer:05}.bin" for name in ("answers", "rows"))
        with answers.open("ab") as data, index.open("ab") as entries:
            for i, row in enumerate(rows):
                if row in self._entries:
                    continue
                found = np.zeros(int(trained[i].sum()), self._position)
                found["ids"], found["log_p"] = said.ids[i][trained[i]], said.log_p[i][trained[i]]
                start = data.tell() // self._position.itemsize
                data.write(found.tobytes())
                data.flush()
                entries.write(np.array((np.void(row), start, len(found)), ENTRY).tobytes())
                self._entries[row] = answers, start, len(found)

    def read(self, rows: list[bytes], trained: np.ndarray) -> Likeliest:
        """What the teacher said at the trained positions [B, T]; anything elsewhere. UserError for a row it never saw."""
        ids = np.zeros((*trained.shape, self.top_k), np.int32)
        log_p = np.zeros((*trained.shape, self.top_k + 1), np.float32)
        for i, row in enumerate(rows):
            if row not in self._entries:
                raise UserError(
                    f"{self.directory} has no answer of the teacher to a row of this batch: the rows, their order, the tokenizer "
                    "or what is trained of them have changed since. Remove it to ask the teacher again, or name another "
                    "quant.teacher_cache."
                )
            path, start, count = self._entries[row]
            found = self._mapped(path, start + count)[start : start + count]
            ids[i][trained[i]], log_p[i][trained[i]] = found["ids"], found["log_p"]
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))  # rounding to float16 left sums beside 1
        return Likeliest(ids, log_p)

    def _check(self, about: Mapping[str, Any]) -> None:
        path, about = self.directory / "teacher.json", json.loads(json.dumps(about))
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._writer == 0:
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(about, indent=1) + "\n")
                partial.replace(path)
            return
        there = json.loads(path.read_text())
        keys = sorted(key for key in there.keys() | about.keys() if there.get(key) != about.get(key))
        if keys not in ([], ["teacher"]):
            listed = "; ".join(f"{key} {there.get(key)!r} there and {about.get(key)!r} here" for key in keys)
            raise UserError(
                f"{self.directory} holds the answers of another teacher: {listed}. Name another quant.teacher_cache, or remove "
                "this one."
            )

    def _read(self, index: Path) -> None:
        answers = index.with_name(index.name.replace("rows", "answers"))
        entries = np.frombuffer(index.read_bytes()[: index.stat().st_size // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        there = answers.stat().st_size // self._position.itemsize
        # A machine that fell may have lost the last answers.
        entries = entries[entries["start"] + entries["count"] <= there]
        for entry in entries:
            self._entries[entry["row"].tobytes()] = answers, int(entry["start"]), int(entry["count"])
        if index.name == f"rows-{self._writer:05}.bin":  # a killed writer may have left the beginning of another answer
            end = int(entries[-1]["start"] + entries[-1]["count"]) if len(entries) else 0
            os.truncate(index, entries.nbytes)
            os.truncate(answers, end * self._position.itemsize)

    def _mapped(self, path: Path, length: int) -> np.ndarray:
        """At least the first `length` positions of a file; it may have grown since it was mapped."""
        if path not in self._maps or len(self._maps[path]) < length:
            count = path.stat().st_size // self._position.itemsize
            self._maps[path] = np.memmap(path, self._position, "r", shape=(count,))
        return self._maps[path]


def rows_of(batch: Mapping[str, Any]) -> list[bytes]:
    """What each row of a batch is known by: a digest of all that a teacher of text reads, and of where it is asked."""
    if batch.get("media") is not None:
        raise UserError(
            "quant.teacher_cache keeps answers to text, but the rows have pictures or sounds; leave it out."
        )
    read = [np.asarray(batch[name], np.int32) for name in ("tokens", "positions", "segment_ids")]
    columns = [*read, np.asarray(batch["loss_weights"]) > 0]
    return [
        hashlib.blake2b(b"".join(x[i].tobytes() for x in columns), digest_size=16).digest()
        for i in range(len(columns[0]))
    ]


def ask(
    answers: Answers,
    make_teacher: Callable[[], Transformer],
    batches: Iterator[Mapping[str, Any]],
    count: int,
    write: Write,
) -> None:
    """Fills `answers` with those to the next `count` batches; the teacher is made at the first row that it has not seen.

    On several processes all ask about the same batches, so each must call this.
    """
    teacher, began, told, asked, tokens = None, time.monotonic(), time.monotonic(), 0, 0
    for number in range(1, count + 1):
        batch = next(batches)
        rows = rows_of(batch)
        if _anywhere(any(row not in answers for row in rows)):
            if teacher is None:
                teacher = make_teacher()
                write(
                    f"asking the teacher about {count} batches: its {answers.top_k} likeliest tokens at each trained position, "
                    f"kept in {answers.directory}"
                )
            trained = np.asarray(batch["loss_weights"]) > 0
            said = likeliest(teacher, place_batch(batch), answers.top_k)
            answers.add(rows, Likeliest(*map(_local, said)), trained)
            asked, tokens = asked + 1, tokens + trained.size
        if time.monotonic() - told > SECONDS:
            told = time.monotonic()
            left = (told - began) / number * (count - number)
            write(f"teacher: batch {number}/{count}, {si(tokens / (told - began))} tokens/s, ETA {duration(left)}")
    write(f"teacher: {count} batches, {count - asked} of them answered before; {duration(time.monotonic() - began)}")


class Taught:
    """Batches with the teacher's answers to them, `taught`; their place is that of `batches`."""

    def __init__(self, batches: Any, answers: Answers):
        self._batches, self._answers = batches, answers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        return {**batch, "taught": self._answers.read(rows_of(batch), np.asarray(batch["loss_weights"]) > 0)}

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return self._batches.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        self._batches.restore(state)


@functools.partial(jax.jit, static_argnames="top_k")
def likeliest(teacher: Transformer, batch: Mapping[str, Any], top_k: int) -> Likeliest:
    """The teacher's likeliest tokens after each token of a batch [B, T]; its logits exist a chunk of rows at a time."""
    hidden = teacher.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    shape, width = hidden.shape[:-1], hidden.shape[-1]
    chunk = default_chunk(teacher.cfg.vocab_size)
    flat = hidden.reshape(-1, width)
    chunks = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, width)

    def answer(part):
        log_p, ids = jax.lax.top_k(jax.nn.log_softmax(teacher.logits(part)), top_k)
        rest = jnp.maximum(1.0 - jnp.exp(log_p).sum(-1, keepdims=True), LEAST_REST)
        return ids, jnp.concatenate([log_p, jnp.log(rest)], axis=-1)

    ids, log_p = (x.reshape(-1, x.shape[-1])[: len(flat)].reshape(*shape, -1) for x in jax.lax.map(answer, chunks))
    return Likeliest(ids, log_p)


def _anywhere(here: bool) -> bool:
    """Whether it holds on any process."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


def _local(x: jax.Array) -> np.ndarray:
    """This process's rows of [B, ...]."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    index, count = batch_share(jax.sharding.get_mesh())
    rows = x.shape[0] // count
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))[index * rows : (index + 1) * rows]

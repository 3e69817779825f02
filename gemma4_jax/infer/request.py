"""What is asked of the engine, and how an answer stands."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.infer.constraint import Constraint
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.infer.text import TextStream
from gemma4_jax.media.pieces import Piece, digest

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as ids and how to continue it.

    Attributes:
        tokens: the prompt.
        max_new_tokens: most tokens of the answer, its stop token included.
        rule: how tokens are drawn.
        seed, stream: two requests with the same of both draw the same; `stream` tells the requests of one seed apart.
        stop_ids: tokens that end the answer.
        stop_texts: texts that end it; they need `decode`.
        decode: ids to text.
        constraint: what may be written; a fresh one, which the engine advances.
        media: pictures, frames and sounds, each where its soft tokens stand in the prompt.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    rule: Rule
    seed: int = 0
    stream: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    constraint: Constraint | None = None
    media: tuple[Piece, ...] = ()

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """int32: the prompt's tokens, and in place of soft tokens negative numbers that tell one picture from another."""
        keys = np.array(self.tokens, np.int32)
        for piece in self.media:
            noise = hashlib.shake_128(digest(piece).encode()).digest(4 * piece.count)
            keys[piece.start : piece.start + piece.count] = np.frombuffer(noise, np.int32) | np.int32(-(2**31))
        return keys

    def check(self, vocab_size: int, max_length: int) -> None:
        """UserError if this can never be answered."""
        if len(self.tokens) == 0:
            raise UserError("the prompt is empty; give at least one token.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is at least 1, got {self.max_new_tokens}.")
        if len(self.tokens) + self.max_new_tokens > max_length:
            raise UserError(
                f"the prompt has {len(self.tokens)} tokens, and with max_new_tokens={self.max_new_tokens} would pass "
                f"max_length={max_length}; shorten it, or ask for fewer new tokens."
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed lies in 0 to 2^32 - 1, got {self.seed}.")
        for what, ids in (("token", self.tokens), ("stop", self.stop_ids)):
            wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
            if wrong is not None:
                raise UserError(f"{what} ids run from 0 to {vocab_size - 1}, got {wrong}.")
        if self.media and self.media[-1].start + self.media[-1].count >= len(self.tokens):
            raise UserError("the prompt ends with a picture or a sound; text must follow it.")
        if self.stop_texts and self.decode is None:
            raise ValueError("Request.stop_texts needs Request.decode.")


@dataclasses.dataclass(eq=False)
class Running:
    """A request and what became of it so far; `Engine.submit` makes it and `Engine.step` changes it.

    Attributes:
        tokens, logprobs: of the answer so far: with the stop token, or up to the token that completed a stop text.
        reason: why the answer ended; None while it has not.
        error: why, if the reason is "error".
        pieces: text that became certain, oldest first, for who streams it; kept only if the request can decode.
        slot: where it runs; None while it waits and after it ended.
        read: tokens of the prompt that are in the cache.
        reused: of these, tokens that an earlier request left there.
        soft: soft tokens of media that are partly read, by their number.
    """

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    pieces: list[str] = dataclasses.field(default_factory=list)
    text: TextStream | None = None
    slot: int | None = None
    read: int = 0
    reused: int = 0
    cuts: list[int] = dataclasses.field(default_factory=list)
    soft: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.request.decode is not None:
            self.text = TextStream(self.request.decode, self.request.stop_texts)

    @property
    def done(self) -> bool:
        return self.reason is not None

    @property
    def reading(self) -> bool:
        """In a slot, with more of the prompt to read."""
        return self.slot is not None and self.read < len(self.request.tokens)

    def take(self, token: int, logprob: float) -> None:
        """One more token of the answer."""
        request = self.request
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in request.stop_ids:
            failed = "" if request.constraint is None else request.constraint.failed
            self.error = failed
            self.end("error" if failed else "stop")
            return
        if self.text is not None:
            self._give(self.text.add(token))
            if self.text.stopped:
                self.end("stop")
                return
        if request.constraint is not None:
            request.constraint.advance(token)
            if request.constraint.failed:
                self.error = request.constraint.failed
                self.end("error")
            elif request.constraint.finished and not request.stop_ids:
                self.end("stop")
        if not self.done and len(self.tokens) >= request.max_new_tokens:
            self.end("length")

    def end(self, reason: Reason) -> None:
        """No more tokens come."""
        self.reason = reason
        self.soft.clear()
        if self.text is not None:
            self._give(self.text.close())

    def _give(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)


def masks_of(running: Sequence[Running | None], vocab_size: int) -> np.ndarray:
    """The masks of requests, one a row, everything allowed where there is no constraint: uint32 [B, ceil(V / 32)]."""
    words = np.full((len(running), -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for row, one in enumerate(running):
        if one is not None and not one.done and one.request.constraint is not None:
            words[row] = one.request.constraint.mask()
    return words

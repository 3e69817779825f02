"""Constraints on what may be written next, and how they go together: a token must be allowed by all of them.

Each sees every token of the output. A mask is never empty: a constraint that has nothing left to allow allows the stop ids
and says in `failed` why, so that one request comes to an end and the others go on.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.infer.vocabulary import Vocabulary


class Constraint(Protocol):
    """What an engine asks of one request's constraint.

    Attributes:
        finished: the output is complete; nothing but a stop id may follow.
        failed: why the constraint could not be kept up; "" while it could.
    """

    @property
    def finished(self) -> bool: ...

    @property
    def failed(self) -> str: ...

    def mask(self) -> np.ndarray:
        """The tokens allowed next, uint32 [ceil(V/32)], see `vocabulary`; not to be written to."""
        ...

    def advance(self, token: int) -> None:
        """`token` was chosen."""
        ...


class Free:
    """What constraints have in common that never end or fail an output."""

    finished = False
    failed = ""


class AllOf:
    """All of some constraints at once. `parts` are fresh ones."""

    def __init__(self, parts: Sequence[Constraint], vocabulary: Vocabulary, stop_ids: Iterable[int]) -> None:
        if not parts:
            raise ValueError("AllOf wants at least one constraint, got none.")
        self._parts = tuple(parts)
        self._stops = vocabulary.stops(stop_ids)
        self._conflict = ""

    @property
    def finished(self) -> bool:
        return bool(self.failed) or any(part.finished for part in self._parts)

    @property
    def failed(self) -> str:
        return self._conflict or next((part.failed for part in self._parts if part.failed), "")

    def mask(self) -> np.ndarray:
        if self.failed:
            return self._stops
        mask = self._parts[0].mask()
        for part in self._parts[1:]:
            mask = mask & part.mask()
        if mask.any():
            return mask
        names = " and ".join(type(part).__name__ for part in self._parts)
        self._conflict = f"The constraints {names} leave no token to go on with."
        return self._stops

    def advance(self, token: int) -> None:
        for part in self._parts:
            part.advance(token)


class Forbid(Free):
    """Some tokens never come: tool calls with tool choice none, thoughts with a budget of 0."""

    def __init__(self, ids: Iterable[int | None], vocabulary: Vocabulary) -> None:
        self._mask = vocabulary.everything & ~vocabulary.mask(ids)

    def mask(self) -> np.ndarray:
        return self._mask

    def advance(self, token: int) -> None:
        """Nothing changes."""


class ThoughtBudget(Free):
    """After `budget` tokens between `<|channel>` and `<channel|>`, the latter comes next; when all are used up, no thought begins.

    The channel's name and its newline count, as the model writes them. 0 forbids thoughts.
    """

    def __init__(self, budget: int, vocabulary: Vocabulary) -> None:
        if budget < 0:
            raise UserError(f"thinking_budget is 0 (no thought) or a number of tokens, got {budget}.")
        special = vocabulary.tokenizer.special
        vocabulary.tokenizer.require(("channel_open", "channel_close"), "A thinking budget")
        self._open, self._close = special.channel_open, special.channel_close
        self._left = budget
        self._thinks = False
        self._everything = vocabulary.everything
        self._must_close = vocabulary.mask([self._close])
        self._no_thought = vocabulary.everything & ~vocabulary.mask([self._open])

    def mask(self) -> np.ndarray:
        if self._left > 0:
            return self._everything
        return self._must_close if self._thinks else self._no_thought

    def advance(self, token: int) -> None:
        if self._thinks:
            self._thinks = token != self._close
            self._left -= self._thinks
        else:
            self._thinks = token == self._open


class Answer:
    """The answer obeys `inner`; a thought before it and, with `calls`, tool calls instead of it do not.

    A thought is text up to `<channel|>`: no stop id can end the output inside it. After a call come calls or the end.
    """

    def __init__(
        self,
        inner: Constraint,
        vocabulary: Vocabulary,
        stop_ids: Iterable[int],
        *,
        thoughts: bool = False,
        calls: bool = False,
    ) -> None:
        special = vocabulary.tokenizer.special
        self._inner = inner
        self._special = special
        self._stop_ids = frozenset(stop_ids)
        self._state = "start"  # start, thought, answer, call, after (a call)
        self._thought, self._call = vocabulary.mask([special.channel_open]), vocabulary.mask([special.tool_call_open])
        self._opens = {
            (True, True): self._thought | self._call,
            (True, False): self._thought,
            (False, True): self._call,
        }
        self._may = (thoughts, calls)
        self._masks = {
            "thought": vocabulary.text | vocabulary.mask([special.channel_close]),
            "call": vocabulary.everything & ~vocabulary.stops(vocabulary.stop_ids),
            "after": self._call | after_calls(vocabulary, self._stop_ids),
        }

    @property
    def finished(self) -> bool:
        return self._state in ("start", "answer") and self._inner.finished

    @property
    def failed(self) -> str:
        return self._inner.failed

    def mask(self) -> np.ndarray:
        if self._state == "start" and any(self._may):
            return self._inner.mask() | self._opens[self._may]
        return self._masks[self._state] if self._state in self._masks else self._inner.mask()

    def advance(self, token: int) -> None:
        special = self._special
        if self._state == "start" and token == special.channel_open and self._may[0]:
            self._state, self._may = "thought", (False, self._may[1])  # one thought
        elif self._state == "thought":
            self._state = "start" if token == special.channel_close else "thought"
        elif self._state in ("start", "after") and token == special.tool_call_open and self._may[1]:
            self._state = "call"
        elif self._state == "call":
            self._state = "after" if token == special.tool_call_close else "call"
        elif self._state != "after":
            self._state = "answer"
            self._inner.advance(token)


def after_calls(vocabulary: Vocabulary, stop_ids: Iterable[int]) -> np.ndarray:
    """What ends an output of tool calls: `<|tool_response>` where it is a stop id, else any stop id."""
    own = vocabulary.tokenizer.special.tool_response_open
    stop_ids = tuple(stop_ids)
    return vocabulary.mask([own]) if own in stop_ids else vocabulary.stops(stop_ids)

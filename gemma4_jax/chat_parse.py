"""What a model wrote becomes a thought, tool calls and an answer: one state machine over token ids.

Ids, not text: a special token is unmistakable, whereas text that merely looks like one is text. A string is accepted too
and cut at the special strings. However the ids are split into feeds, the parse is the same, and the texts of the events
joined are the parse. Output that was cut off anywhere parses to what is there; a tool call that is incomplete or malformed
is kept apart as text and never passed on as a call.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma4_jax.chat_call import read_call
from gemma4_jax.chat_text import TextDecoder
from gemma4_jax.tokenizer import CHAT, SPECIAL_PIECES, Tokenizer

QUOTE = SPECIAL_PIECES["quote"]
MARKERS = tuple(SPECIAL_PIECES[name] for name in (*CHAT, "eos", "pad", "bos") if name != "newline")
MARKER_PATTERN = re.compile("|".join(re.escape(marker) for marker in MARKERS))
STOPS = tuple(SPECIAL_PIECES[name] for name in ("eos", "turn_close", "tool_response_open"))
CHANNEL_OPEN, CHANNEL_CLOSE = SPECIAL_PIECES["channel_open"], SPECIAL_PIECES["channel_close"]
CALL_OPEN, CALL_CLOSE = SPECIAL_PIECES["tool_call_open"], SPECIAL_PIECES["tool_call_close"]
HEADER = "thought"  # the channel's name, its first line

EventKind = Literal["thought", "answer", "tool_call", "malformed", "stop"]


@dataclass(frozen=True)
class Parsed:
    """A parsed output.

    Attributes:
        thought: text of the thought channel, "" if there was none.
        tool_calls: `{"name": str, "arguments": dict}` for each complete, well-formed call, in order.
        answer: everything else.
        malformed: text of the calls that could not be read.
        stopped: a stop token was seen, so the output is whole.
    """

    thought: str
    tool_calls: list[dict[str, Any]]
    answer: str
    malformed: list[str] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class Event:
    """Something that became certain.

    Attributes:
        kind: thought and answer carry a piece of text, tool_call a call, malformed the text of an unreadable call; stop is the
            stop token.
        text: of thought and answer, the piece that follows the pieces before it; of malformed, the whole text.
        call: of tool_call, `{"name": str, "arguments": dict}`.
    """

    kind: EventKind
    text: str = ""
    call: dict[str, Any] | None = None


class StreamParser:
    """Takes token ids as they are generated, in any portions; ends with `finish`, after which `result` is the parse."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._turn = _Turn()
        self._text = TextDecoder(tokenizer)
        names = (name for name, piece in SPECIAL_PIECES.items() if piece in MARKERS)
        ids = ((getattr(tokenizer.special, name), SPECIAL_PIECES[name]) for name in names)
        self._marker_of = {index: piece for index, piece in ids if index is not None}

    def feed(self, tokens: Iterable[int]) -> list[Event]:
        """What these tokens made certain."""
        events: list[Event] = []
        run: list[int] = []
        for index in (int(index) for index in tokens):
            marker = self._marker_of.get(index)
            if marker is None:
                run.append(index)
                continue
            events += self._turn.text(self._text.feed(run) + self._text.finish())
            events += self._turn.marker(marker)
            run = []
        return events + self._turn.text(self._text.feed(run))

    def finish(self) -> list[Event]:
        """What the end of the output made certain: a character or a call that was cut short."""
        return self._turn.text(self._text.finish()) + self._turn.end()

    def result(self) -> Parsed:
        """The parse of what has come so far."""
        return self._turn.result()


def parse(output: str | Iterable[int], tokenizer: Tokenizer | None = None) -> Parsed:
    """Parses a model's output: token ids (with the tokenizer), or its text with special strings."""
    if not isinstance(output, str):
        if tokenizer is None:
            raise ValueError("parse needs the tokenizer to read token ids.")
        parser = StreamParser(tokenizer)
        parser.feed(output)
        parser.finish()
        return parser.result()
    turn = _Turn()
    for piece, is_marker in _cut_text(output):
        turn.marker(piece) if is_marker else turn.text(piece)
    turn.end()
    return turn.result()


def _cut_text(text: str) -> Iterator[tuple[str, bool]]:
    """(marker, True) and (text, False), in order."""
    start = 0
    for match in MARKER_PATTERN.finditer(text):
        yield text[start : match.start()], False
        yield match.group(), True
        start = match.end()
    yield text[start:], False


class _Turn:
    """The state machine: markers and texts in, events out."""

    def __init__(self) -> None:
        self._state = "answer"  # answer, thought, call; stopped after a stop token
        self._trimmed = _Trimmed()
        self._answer: list[str] = []
        self._thought = _Thought()
        self._thoughts: list[str] = []
        self._call: list[str] = []  # texts of the current call: outside quotes at even places, inside at odd ones
        self._calls: list[dict[str, Any]] = []
        self._malformed: list[str] = []

    def text(self, text: str) -> list[Event]:
        """Ordinary text."""
        if not text or self._state == "stopped":
            return []
        if self._state == "call":
            self._call[-1] += text
            return []
        if self._state == "answer":
            return self._emit("answer", self._answer, self._trimmed.feed(text))
        first = not self._thought.begun
        piece = self._thought.feed(text)
        return self._emit("thought", self._thoughts, "\n\n" + piece if piece and first and self._thoughts else piece)

    def marker(self, marker: str) -> list[Event]:
        """One special token, by its string."""
        if self._state == "stopped":
            return []
        if marker == QUOTE:
            if self._state == "call":
                self._call.append("")
        elif marker == CHANNEL_CLOSE:
            self._state = "answer" if self._state == "thought" else self._state
        elif marker == CALL_CLOSE:
            return self._end_call(complete=True)
        elif marker in (CHANNEL_OPEN, CALL_OPEN, *STOPS):
            events = self._end_call(complete=False)
            self._state = {CHANNEL_OPEN: "thought", CALL_OPEN: "call"}.get(marker, "stopped")
            self._thought, self._call = _Thought(), [""]
            return events + ([Event("stop")] if self._state == "stopped" else [])
        return []

    def end(self) -> list[Event]:
        """No more will come."""
        return self._end_call(complete=False)

    def result(self) -> Parsed:
        malformed = [*self._malformed, *([QUOTE.join(self._call)] if self._state == "call" else [])]
        thought, answer = "".join(self._thoughts), "".join(self._answer)
        return Parsed(thought, list(self._calls), answer, malformed, self._state == "stopped")

    def _emit(self, kind: EventKind, pieces: list[str], piece: str) -> list[Event]:
        if not piece:
            return []
        pieces.append(piece)
        return [Event(kind, piece)]

    def _end_call(self, complete: bool) -> list[Event]:
        """Leaves the state `call`: a complete, well-formed call is kept, anything else goes to `malformed`."""
        if self._state != "call":
            return []
        self._state = "answer"
        call = read_call(self._call) if complete else None
        if call is None:
            self._malformed.append(QUOTE.join(self._call))
            return [Event("malformed", self._malformed[-1])]
        self._calls.append(call)
        return [Event("tool_call", call=call)]


class _Trimmed:
    """A text without the white space around it, as it comes: space is held back until something follows it."""

    def __init__(self) -> None:
        self.begun = False
        self._space = ""

    def feed(self, text: str) -> str:
        text = self._space + text if self.begun else text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self.begun = self.begun or bool(piece)
        return piece


class _Thought:
    """A thought without the channel's name in its first line, trimmed; nothing while that line may still be the name."""

    def __init__(self) -> None:
        self._line: str | None = ""
        self._trimmed = _Trimmed()

    @property
    def begun(self) -> bool:
        """Some text has come out."""
        return self._trimmed.begun

    def feed(self, text: str) -> str:
        if self._line is not None:
            self._line += text
            name, newline, rest = self._line.partition("\n")
            if not newline and HEADER.startswith(name.strip()):
                return ""
            text = rest if name.strip() == HEADER else self._line
            self._line = None
        return self._trimmed.feed(text)

"""What a model wrote becomes a thought, tool calls and an answer: one state machine over token ids.

Ids, not text: a special token is unmistakable, whereas text that merely looks like one is text. A string is accepted too
and cut at the special strings. Output that was cut off anywhere parses to what is there; a tool call that is incomplete or
malformed is kept apart as text and never passed on as a call.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma4_jax.tokenizer import CHAT, SPECIAL_PIECES, Tokenizer

QUOTE = SPECIAL_PIECES["quote"]
MARKERS = tuple(SPECIAL_PIECES[name] for name in (*CHAT, "eos", "pad", "bos") if name != "newline")
MARKER_PATTERN = re.compile("|".join(re.escape(marker) for marker in MARKERS))
STOPS = tuple(SPECIAL_PIECES[name] for name in ("eos", "turn_close", "tool_response_open"))
CHANNEL_OPEN, CHANNEL_CLOSE = SPECIAL_PIECES["channel_open"], SPECIAL_PIECES["channel_close"]
CALL_OPEN, CALL_CLOSE = SPECIAL_PIECES["tool_call_open"], SPECIAL_PIECES["tool_call_close"]

WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "None": None}


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


class OutputParser:
    """Takes the output piece by piece, as it is generated: `feed` markers and texts, `result` at any time."""

    def __init__(self) -> None:
        self._state = "answer"  # answer, thought, call; stopped after a stop token
        self._answer = ""
        self._thoughts: list[str] = []
        self._call: list[str] = []  # texts of the current call: outside quotes at even places, inside at odd ones
        self._calls: list[dict[str, Any]] = []
        self._malformed: list[str] = []

    def feed(self, piece: str, marker: bool) -> None:
        """One special token by its string (`marker=True`), or some ordinary text."""
        if self._state == "stopped":
            return
        if not marker:
            self._text(piece)
        elif piece == QUOTE:
            if self._state == "call":
                self._call.append("")
        elif piece == CHANNEL_CLOSE:
            self._state = "answer" if self._state == "thought" else self._state
        elif piece == CALL_CLOSE:
            self._end_call(complete=True)
        elif piece in (CHANNEL_OPEN, CALL_OPEN, *STOPS):
            self._end_call(complete=False)
            self._state = {CHANNEL_OPEN: "thought", CALL_OPEN: "call"}.get(piece, "stopped")
            if piece == CHANNEL_OPEN:
                self._thoughts.append("")
            self._call = [""]

    def result(self) -> Parsed:
        """What has come so far."""
        malformed = [*self._malformed, *([QUOTE.join(self._call)] if self._state == "call" else [])]
        thought = "\n\n".join(filter(None, (_without_header(thought) for thought in self._thoughts)))
        return Parsed(thought, list(self._calls), self._answer.strip(), malformed, self._state == "stopped")

    def _text(self, text: str) -> None:
        if self._state == "call":
            self._call[-1] += text
        elif self._state == "thought":
            self._thoughts[-1] += text
        else:
            self._answer += text

    def _end_call(self, complete: bool) -> None:
        """Leaves the state `call`: a complete, well-formed call is kept, anything else goes to `malformed`."""
        if self._state != "call":
            return
        call = read_call(self._call) if complete else None
        if call is None:
            self._malformed.append(QUOTE.join(self._call))
        else:
            self._calls.append(call)
        self._state = "answer"


def parse(output: str | Iterable[int], tokenizer: Tokenizer | None = None) -> Parsed:
    """Parses a model's output: token ids (with the tokenizer), or its text with special strings."""
    parser = OutputParser()
    if isinstance(output, str):
        pieces = _cut_text(output)
    elif tokenizer is None:
        raise ValueError("parse needs the tokenizer to read token ids.")
    else:
        pieces = _cut_ids(output, tokenizer)
    for piece, marker in pieces:
        parser.feed(piece, marker)
    return parser.result()


def _cut_text(text: str) -> Iterator[tuple[str, bool]]:
    start = 0
    for match in MARKER_PATTERN.finditer(text):
        yield text[start : match.start()], False
        yield match.group(), True
        start = match.end()
    yield text[start:], False


def _cut_ids(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Markers one by one, the ids between them decoded together (a character can be several byte pieces)."""
    special = tokenizer.special
    names = (name for name, piece in SPECIAL_PIECES.items() if piece in MARKERS)
    marker_of = {index: SPECIAL_PIECES[name] for name in names if (index := getattr(special, name)) is not None}
    run: list[int] = []
    for index in (int(index) for index in ids):
        marker = marker_of.get(index)
        if marker is None:
            run.append(index)
            continue
        yield tokenizer.decode(run), False
        yield marker, True
        run = []
    yield tokenizer.decode(run), False


def _without_header(thought: str) -> str:
    """A thought without the channel's name in its first line; nothing while that line is still being written."""
    name, newline, rest = thought.partition("\n")
    if not newline and "thought".startswith(name):
        return ""
    return (rest if name.strip() == "thought" else thought).strip()


def read_call(parts: Sequence[str]) -> dict[str, Any] | None:
    """A tool call from its text, cut at the quote tokens; None when it is malformed.

    `["call:f{a:", "x", ",n:1}"]` gives `{"name": "f", "arguments": {"a": "x", "n": 1}}`.
    """
    name, brace, rest = parts[0].partition("{")
    if not name.startswith("call:") or not brace or len(parts) % 2 == 0:
        return None
    reader = _Reader(["{" + rest, *parts[1:]])
    try:
        arguments = reader.value()
    except _SyntaxError:
        return None
    return {"name": name.removeprefix("call:").strip(), "arguments": arguments} if reader.at_end() else None


class _SyntaxError(Exception):
    """The text is not in the argument notation."""


class _Reader:
    """Recursive descent over the argument notation; `tokens` are (kind, text) with kind string, word or a punctuation mark."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._tokens: list[tuple[str, str]] = []
        for place, part in enumerate(parts):
            if place % 2:
                self._tokens.append(("string", part))
            else:
                found = re.findall(r"[{}\[\]:,]|[^{}\[\]:,]+", part)
                tokens = ((text if text in "{}[]:," else "word", text) for text in found)
                self._tokens.extend((kind, text.strip()) for kind, text in tokens if text.strip())
        self._next = 0

    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def value(self) -> Any:
        """A string, word, list or mapping."""
        kind, text = self._take()
        if kind == "string":
            return text
        if kind == "word":
            return read_word(text)
        if kind == "[":
            return self._list()
        if kind == "{":
            return self._mapping()
        raise _SyntaxError

    def _list(self) -> list[Any]:
        items: list[Any] = []
        while not self._closes("]", bool(items)):
            items.append(self.value())
        return items

    def _mapping(self) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._closes("}", bool(pairs)):
            kind, key = self._take()
            if kind not in ("word", "string") or self._take()[0] != ":":
                raise _SyntaxError
            pairs[key] = self.value()
        return pairs

    def _closes(self, bracket: str, comma: bool) -> bool:
        """Takes the closing bracket if it is next; otherwise, after the first item, takes the comma."""
        if self._next < len(self._tokens) and self._tokens[self._next][0] == bracket:
            self._next += 1
            return True
        if comma and self._take()[0] != ",":
            raise _SyntaxError
        return False

    def _take(self) -> tuple[str, str]:
        if self.at_end():
            raise _SyntaxError
        self._next += 1
        return self._tokens[self._next - 1]


def read_word(word: str) -> Any:
    """An unquoted value: true, false, null (the template writes None), a number, or else the word itself."""
    if word in WORDS:
        return WORDS[word]
    if re.fullmatch(r"[+-]?\d+", word):
        return int(word)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word):
        return float(word)
    return word

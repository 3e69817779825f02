"""The text of a tool call becomes its name and JSON arguments: Gemma 4's own notation, read back as `chat_syntax` writes it.

Strings come between quote tokens, so the text is given in parts cut there; what is inside a string is never looked at.
"""

import re
from collections.abc import Sequence
from typing import Any

WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "None": None}


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

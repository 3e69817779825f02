"""Token ids become text piece by piece: whole characters only, and nothing that may turn out to begin a stop text."""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"


class TextStream:
    """The text of an answer as it is written.

    A character may take several byte tokens, so text is given out up to the last whole character; and a stop text may begin at
    the end of what is written, so that end is held back until it is clear. All pieces together are the whole text up to the
    stop text.

    Attributes:
        stopped: a stop text was completed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self.stopped = False
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._from = 0  # ids before this one no longer matter to how later ones decode
        self._seen = 0  # ids up to here are in the text
        self._text = ""
        self._given = 0

    @property
    def text(self) -> str:
        """Everything so far, whole characters, without a stop text."""
        return self._text

    def add(self, token: int) -> str:
        """The piece of text that is certain after one more token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._seen])
        after = self._decode(self._ids[self._from :])
        if after.endswith(BROKEN) and len(self._ids) - self._seen < 8:  # a character has up to 4 bytes
            return ""
        return self._grow(after[len(before) :], whole=False)

    def close(self) -> str:
        """What was held back, after the last token."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._seen])
        return self._grow(self._decode(self._ids[self._from :])[len(before) :], whole=True)

    def _grow(self, new: str, *, whole: bool) -> str:
        longest = max(map(len, self._stops), default=1)
        search = max(0, len(self._text) - longest + 1)
        self._text += new
        self._from, self._seen = self._seen, len(self._ids)
        places = [place for stop in self._stops if (place := self._text.find(stop, search)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True
        certain = len(self._text) if whole or self.stopped else len(self._text) - self._held()
        piece = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    def _held(self) -> int:
        """Characters at the end that may begin a stop text."""
        tail = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(tail, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0

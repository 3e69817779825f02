"""Token ids become text as they come, cut only between characters.

A character outside the vocabulary is written as several byte pieces; its text appears with the last of them. Bytes that are
no character become one U+FFFD each, as in SentencePiece, once it is certain that they are none. The pieces joined are the
text of the whole, however the ids were split.
"""

import functools
from collections.abc import Iterable

from gemma4_jax.errors import UserError
from gemma4_jax.tokenizer import Tokenizer

NO_CHARACTER = "\ufffd"


class TextDecoder:
    """`feed` ids, get the text they complete; `finish` gives what was left: the bytes of a character cut short."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._byte_of = byte_ids(tokenizer)
        self._bytes = bytearray()  # the beginning of a character

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain now and was not before; special ids give their strings."""
        text: list[str] = []
        run: list[int] = []
        for index in (int(index) for index in ids):
            byte = self._byte_of.get(index)
            if byte is None:
                text.append(self.finish())
                run.append(index)
                continue
            if run:
                text.append(self._decode(run))
                run = []
            self._bytes.append(byte)
            text.append(self._characters())
        if run:
            text.append(self._decode(run))
        return "".join(text)

    def finish(self) -> str:
        """The text of what is held back. The decoder can go on with the next id."""
        text = NO_CHARACTER * len(self._bytes)
        self._bytes.clear()
        return text

    def _characters(self) -> str:
        """Takes what the held bytes have decided: all of them but the valid beginning of a character."""
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode()
                self._bytes.clear()
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode()
                if error.reason == "unexpected end of data":
                    del self._bytes[: error.start]
                    break
                text += NO_CHARACTER
                del self._bytes[: error.start + 1]
        return text


@functools.lru_cache(maxsize=8)
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The byte that each byte piece stands for; empty for a tokenizer without byte pieces."""
    found = {}
    for byte in range(256):
        try:
            found[tokenizer.id_of(f"<0x{byte:02X}>")] = byte
        except UserError:
            continue
    return found

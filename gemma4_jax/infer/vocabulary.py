"""What each token can write, and sets of tokens as bit masks: uint32 [ceil(V/32)], bit t % 32 of word t // 32 for token t."""

import functools
import re
from collections.abc import Iterable

import numpy as np

from gemma4_jax.chat_text import byte_ids
from gemma4_jax.tokenizer import SPECIAL_PIECES, Tokenizer

# Pieces that stand for no text and have no field in SpecialIds.
RESERVED = re.compile(r"<unused\d+>|<mask>|\[multimodal\]")


class Vocabulary:
    """The tokens of a tokenizer as a constraint sees them. Make it with `Vocabulary.of`, which keeps it.

    Attributes:
        size: V.
        texts: bytes that each token writes, its name for one that writes no text.
        special: ids that write no text: markers, media, reserved ones.
        stop_ids: the tokenizer's.
        everything, text: masks of all tokens and of those that write text. Not to be written to, like every mask.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.stop_ids = tokenizer.stop_ids
        named = {getattr(tokenizer.special, name) for name in SPECIAL_PIECES if name != "newline"}
        byte_of = byte_ids(tokenizer)
        self.texts: list[bytes] = []
        self.special: list[int] = []
        for index in range(self.size):
            piece = tokenizer.piece_of(index)
            if index in named or RESERVED.fullmatch(piece):
                self.special.append(index)
            byte = byte_of.get(index)
            self.texts.append(piece.replace("▁", " ").encode() if byte is None else bytes([byte]))
        self.everything = self.mask(range(self.size))
        self.text = self.everything & ~self.mask(self.special)

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(tokenizer: Tokenizer) -> "Vocabulary":
        """That of a tokenizer; made once, 0.7 s for 262,144 pieces."""
        return Vocabulary(tokenizer)

    def mask(self, ids: Iterable[int | None]) -> np.ndarray:
        """The set of `ids`; None, a piece this tokenizer lacks, is in no set."""
        bits = np.zeros(-(-self.size // 32) * 32, np.uint8)
        bits[[index for index in ids if index is not None]] = 1
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    def stops(self, ids: Iterable[int]) -> np.ndarray:
        """The set of stop ids, never empty: without any, `<eos>`, since some token must be left to choose."""
        return self.mask(tuple(ids) or (self.tokenizer.special.eos,))


def ids_of(mask: np.ndarray) -> np.ndarray:
    """The tokens in a mask, ascending."""
    return np.flatnonzero(np.unpackbits(np.ascontiguousarray(mask).astype("<u4").view(np.uint8), bitorder="little"))

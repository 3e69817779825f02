"""One picture, frame or sound as arrays, with the place of its soft tokens in a sequence."""

import dataclasses
import hashlib
from typing import Self

import numpy as np

from gemma4_jax.model.multimodal import soft_frames


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePiece:
    """A picture or a frame of a video.

    cells: uint8 [S, C, P], soft token by soft token (row by row) its patches (row by row), a patch by rows, columns, colours.
    columns: soft tokens of a row. budget: the most a picture of its group may have, which is what it is padded to.
    start: index of its first soft token in the sequence. kind: "image" or "video".
    """

    cells: np.ndarray
    columns: int
    budget: int
    kind: str = "image"
    start: int = 0

    @property
    def count(self) -> int:
        """Soft tokens."""
        return len(self.cells)

    @property
    def nbytes(self) -> int:
        return self.cells.nbytes

    def at(self, start: int) -> Self:
        """The same piece elsewhere in a sequence."""
        return dataclasses.replace(self, start=start)


@dataclasses.dataclass(frozen=True, eq=False)
class SoundPiece:
    """A sound: mel float32 [F, 128], frames of 10 ms; start as in ImagePiece."""

    mel: np.ndarray
    kind: str = "audio"
    start: int = 0

    @property
    def count(self) -> int:
        """Soft tokens: one for 40 ms."""
        return soft_frames(len(self.mel))

    @property
    def nbytes(self) -> int:
        return self.mel.nbytes

    def at(self, start: int) -> Self:
        """The same piece elsewhere in a sequence."""
        return dataclasses.replace(self, start=start)


Piece = ImagePiece | SoundPiece


def digest(piece: Piece) -> str:
    """What tells two pieces apart whose placeholders are the same: for caches that go by tokens."""
    values = piece.cells if isinstance(piece, ImagePiece) else piece.mel
    columns = piece.columns if isinstance(piece, ImagePiece) else 0
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes() + bytes([columns % 256]), digest_size=16).hexdigest()


def shifted(pieces: tuple[Piece, ...], by: int) -> tuple[Piece, ...]:
    """The pieces of an example that begins `by` tokens into a packed row."""
    return tuple(piece.at(piece.start + by) for piece in pieces)


def uncut(pieces: tuple[Piece, ...], cut: int) -> int:
    """The last place at or before `cut` where a sequence may be cut without splitting a picture: for chunks of a prompt.

    The tokens of a picture see the whole picture (26B and 31B), so all of them must be in one chunk.
    """
    for piece in pieces:
        if isinstance(piece, ImagePiece) and piece.start < cut < piece.start + piece.count:
            return piece.start
    return cut

"""Pieces of a batch of sequences as one `Media` of few possible shapes.

Pictures of one budget are one group, padded to the budget and to a round number of pictures; sounds likewise. So the shapes of
a program depend on round numbers, not on what a prompt holds.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gemma4_jax.config_media import VisionConfig
from gemma4_jax.media.images import patch_positions
from gemma4_jax.media.pieces import ImagePiece, Piece, SoundPiece
from gemma4_jax.media.sounds import BINS
from gemma4_jax.model.multimodal import Media, Patches, Sounds, soft_frames

FRAME_BUCKETS = (100, 200, 300, 400, 600, 800, 1000, 1200, 1600, 2000, 2500, 3000)
"""Frames of 10 ms that sounds are padded to: 1 s to 30 s."""


@dataclasses.dataclass(frozen=True)
class MediaShape:
    """How many media there are, or have room: `images` (budget, pictures) by rising budget; `clips` of at most `frames`."""

    images: tuple[tuple[int, int], ...] = ()
    clips: int = 0
    frames: int = 0

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "MediaShape":
        """What these pieces need."""
        total = cls()
        for piece in pieces:
            one = cls(((piece.budget, 1),)) if isinstance(piece, ImagePiece) else cls((), 1, len(piece.mel))
            total = total + one
        return total

    def __bool__(self) -> bool:
        return bool(self.images or self.clips)

    def __add__(self, other: "MediaShape") -> "MediaShape":
        """Room for both."""
        images = {budget: self.pictures(budget) + other.pictures(budget) for budget in self._budgets(other)}
        return MediaShape(tuple(images.items()), self.clips + other.clips, max(self.frames, other.frames))

    def __or__(self, other: "MediaShape") -> "MediaShape":
        """Room for either."""
        images = {budget: max(self.pictures(budget), other.pictures(budget)) for budget in self._budgets(other)}
        return MediaShape(tuple(images.items()), max(self.clips, other.clips), max(self.frames, other.frames))

    def pictures(self, budget: int) -> int:
        """Pictures of one budget."""
        return dict(self.images).get(budget, 0)

    def rounded(self, multiple_of: int = 1) -> "MediaShape":
        """The next round numbers: of pictures and clips those of `rounded_up`, of frames those of FRAME_BUCKETS."""
        images = tuple((budget, rounded_up(count, multiple_of)) for budget, count in self.images)
        frames = next((size for size in FRAME_BUCKETS if size >= self.frames), self.frames)
        return MediaShape(images, rounded_up(self.clips, multiple_of), frames) if self.clips else MediaShape(images)

    def described(self) -> str:
        """`12 pictures of 280 soft tokens and 4 sounds of 10 s`."""
        found = [f"{count} pictures of {budget} soft tokens" for budget, count in self.images]
        found += [f"{self.clips} sounds of {self.frames / 100:g} s"] * bool(self.clips)
        return " and ".join(found) or "none"

    def _budgets(self, other: "MediaShape") -> list[int]:
        return sorted({budget for budget, _ in (*self.images, *other.images)})


def batch_media(
    rows: Sequence[Sequence[Piece]],
    length: int,
    vision: VisionConfig | None,
    *,
    multiple_of: int = 1,
    shape: MediaShape | None = None,
    share: tuple[int, int] = (0, 1),
) -> Media | None:
    """What the model takes for sequences [len(rows), length] with these pieces; None if `shape` has room for none.

    Args:
      rows: the pieces of each sequence, `start` counted from the sequence's first slot. What stands beyond `length` is an error.
      length: slots of a sequence.
      vision: of the model; None if it has no eyes, and no row has pictures.
      multiple_of: make the numbers of pictures and sounds divisible by so many devices.
      shape: room to make; None: what these rows need, rounded.
      share: (index, count) where these are one of several equal shares of a batch, each of this shape: soft tokens are numbered
        through all shares.
    """
    placed = [(row, piece) for row, pieces in enumerate(rows) for piece in pieces]
    for _, piece in placed:
        if piece.start < 0 or piece.start + piece.count > length:
            raise ValueError(f"a piece of {piece.count} soft tokens at {piece.start} does not fit into {length} slots")
    shape = MediaShape.of(piece for _, piece in placed).rounded(multiple_of) if shape is None else shape
    if not shape:
        return None
    soft_index = np.full((len(rows), length), -1, np.int32)
    block_ids = np.zeros((len(rows), length), np.int32)
    groups, base, block, (index, shares) = [], 0, 0, share
    for budget, count in shape.images:
        if vision is None:
            raise ValueError("pictures need the sizes of the vision tower")
        members = [(row, piece) for row, piece in placed if isinstance(piece, ImagePiece) and piece.budget == budget]
        groups.append(_patches([piece for _, piece in members], budget, count, vision))
        for number, (row, piece) in enumerate(members, index * count):
            here = slice(piece.start, piece.start + piece.count)
            soft_index[row, here] = base + number * budget + np.arange(piece.count)
            block += 1
            block_ids[row, here] = block
        base += shares * count * budget
    heard = [(row, piece) for row, piece in placed if isinstance(piece, SoundPiece)]
    if len(heard) + block != len(placed):
        raise ValueError(f"{shape} has no room for pictures of another budget, which these rows have")
    sounds = _sounds([piece for _, piece in heard], shape) if shape.clips or heard else None
    for number, (row, piece) in enumerate(heard, index * shape.clips):
        first = base + number * soft_frames(shape.frames)
        soft_index[row, piece.start : piece.start + piece.count] = first + np.arange(piece.count)
    return Media(soft_index, block_ids, tuple(groups), sounds)  # type: ignore[arg-type]  # numpy until it is on a device


def rounded_up(count: int, multiple_of: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple_of`."""
    units = -(-count // multiple_of)
    power = 1 << (units - 1).bit_length()
    between = power * 3 // 4
    return (between if power >= 4 and units <= between else power) * multiple_of


def _patches(pieces: list[ImagePiece], budget: int, count: int, vision: VisionConfig) -> Patches:
    if len(pieces) > count:
        raise ValueError(f"{len(pieces)} pictures of {budget} soft tokens do not fit into {count}")
    pixels = np.zeros((count, budget, vision.cell_patches, vision.patch_values), np.uint8)
    positions = np.full((count, budget, vision.cell_patches, 2), -1, np.int32)
    for number, piece in enumerate(pieces):
        pixels[number, : piece.count] = piece.cells
        positions[number, : piece.count] = patch_positions(piece.count, piece.columns, vision.pooling_kernel_size)
    return Patches(pixels, positions)  # type: ignore[arg-type]


def _sounds(pieces: list[SoundPiece], shape: MediaShape) -> Sounds:
    if len(pieces) > shape.clips or max((len(piece.mel) for piece in pieces), default=0) > shape.frames:
        raise ValueError(f"{len(pieces)} sounds do not fit into {shape.clips} of {shape.frames} frames")
    mel = np.zeros((shape.clips, shape.frames, BINS), np.float32)
    valid = np.zeros((shape.clips, shape.frames), bool)
    for number, piece in enumerate(pieces):
        mel[number, : len(piece.mel)] = piece.mel
        valid[number, : len(piece.mel)] = True
    return Sounds(mel, valid)  # type: ignore[arg-type]

"""Pieces of a batch of sequences as one `Media` of few possible shapes.

Pictures of one budget are one group, padded to the budget and to a round number of pictures; sounds likewise. So the shapes of
a program depend on round numbers, not on what a prompt holds.
"""

from collections.abc import Sequence

import numpy as np

from gemma4_jax.config_media import VisionConfig
from gemma4_jax.media.images import patch_positions
from gemma4_jax.media.pieces import ImagePiece, Piece, SoundPiece
from gemma4_jax.media.sounds import BINS
from gemma4_jax.model.multimodal import Media, Patches, Sounds, soft_frames

FRAME_BUCKETS = (100, 200, 300, 400, 600, 800, 1000, 1200, 1600, 2000, 2500, 3000)
"""Frames of 10 ms that sounds are padded to: 1 s to 30 s."""


def batch_media(
    rows: Sequence[Sequence[Piece]], length: int, vision: VisionConfig | None, *, multiple_of: int = 1
) -> Media | None:
    """What the model takes for sequences [len(rows), length] with these pieces; None if there are none.

    Args:
      rows: the pieces of each sequence, `start` counted from the sequence's first slot. What stands beyond `length` is an error.
      length: slots of a sequence.
      vision: of the model; None if it has no eyes, and no row has pictures.
      multiple_of: make the numbers of pictures and sounds divisible by so many devices.
    """
    placed = [(row, piece) for row, pieces in enumerate(rows) for piece in pieces]
    for _, piece in placed:
        if piece.start < 0 or piece.start + piece.count > length:
            raise ValueError(f"a piece of {piece.count} soft tokens at {piece.start} does not fit into {length} slots")
    if not placed:
        return None
    soft_index = np.full((len(rows), length), -1, np.int32)
    block_ids = np.zeros((len(rows), length), np.int32)
    groups, base, block = [], 0, 0
    for budget in sorted({piece.budget for _, piece in placed if isinstance(piece, ImagePiece)}):
        if vision is None:
            raise ValueError("pictures need the sizes of the vision tower")
        members = [(row, piece) for row, piece in placed if isinstance(piece, ImagePiece) and piece.budget == budget]
        groups.append(_patches([piece for _, piece in members], budget, vision, multiple_of))
        for number, (row, piece) in enumerate(members):
            here = slice(piece.start, piece.start + piece.count)
            soft_index[row, here] = base + number * budget + np.arange(piece.count)
            block += 1
            block_ids[row, here] = block
        base += len(groups[-1].pixels) * budget
    heard = [(row, piece) for row, piece in placed if isinstance(piece, SoundPiece)]
    sounds = _sounds([piece for _, piece in heard], multiple_of) if heard else None
    for number, (row, piece) in enumerate(heard):
        assert sounds is not None
        first = base + number * soft_frames(sounds.mel.shape[1])
        soft_index[row, piece.start : piece.start + piece.count] = first + np.arange(piece.count)
    return Media(soft_index, block_ids, tuple(groups), sounds)  # type: ignore[arg-type]  # numpy until it is on a device


def rounded_up(count: int, multiple_of: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple_of`."""
    units = -(-count // multiple_of)
    power = 1 << (units - 1).bit_length()
    between = power * 3 // 4
    return (between if power >= 4 and units <= between else power) * multiple_of


def _patches(pieces: list[ImagePiece], budget: int, vision: VisionConfig, multiple_of: int) -> Patches:
    count = rounded_up(len(pieces), multiple_of)
    pixels = np.zeros((count, budget, vision.cell_patches, vision.patch_values), np.uint8)
    positions = np.full((count, budget, vision.cell_patches, 2), -1, np.int32)
    for number, piece in enumerate(pieces):
        pixels[number, : piece.count] = piece.cells
        positions[number, : piece.count] = patch_positions(piece.count, piece.columns, vision.pooling_kernel_size)
    return Patches(pixels, positions)  # type: ignore[arg-type]


def _sounds(pieces: list[SoundPiece], multiple_of: int) -> Sounds:
    longest = max(len(piece.mel) for piece in pieces)
    frames = next((size for size in FRAME_BUCKETS if size >= longest), longest)
    count = rounded_up(len(pieces), multiple_of)
    mel = np.zeros((count, frames, BINS), np.float32)
    valid = np.zeros((count, frames), bool)
    for number, piece in enumerate(pieces):
        mel[number, : len(piece.mel)] = piece.mel
        valid[number, : len(piece.mel)] = True
    return Sounds(mel, valid)  # type: ignore[arg-type]

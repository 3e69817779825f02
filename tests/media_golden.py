"""The multimodal fixtures as the tests use them: prompts made of our own pieces, from the same seeds (golden/media_inputs.py)."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
import json
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import PROJECT

from gemma4_jax.checkpoint.load import load
from gemma4_jax.media.pieces import Piece
from gemma4_jax.model.transformer import Transformer

GOLDEN = PROJECT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
import media_inputs as recipes  # noqa: E402

from gemma4_jax.media.images import patches_of  # noqa: E402
from gemma4_jax.media.sounds import sound_piece  # noqa: E402

pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")


class Golden(NamedTuple):
    """A fixture and our model of it."""

    model: Transformer
    numbers: dict[str, np.ndarray]
    facts: dict[str, Any]

    def tolerance(self, name: str) -> float:
        return self.facts["tolerances"][name]["value"]


@functools.cache
def golden(fixture: str) -> Golden:
    directory = GOLDEN / fixture
    with np.load(directory / "expected.npz") as file:
        numbers = dict(file)
    facts = json.loads((directory / "expected.json").read_text())
    return Golden(load(directory, dtype="float32"), numbers, facts)


def pieces_of(fixture: str, case: str) -> list[list[Piece]]:
    """Our pieces of every row of a prompt, each where the reference's tokens have its placeholders."""
    g = golden(fixture)
    ids, vision, audio = g.numbers[f"{case}/input_ids"], g.model.cfg.vision, g.model.cfg.audio
    assert vision is not None
    found: list[list[Piece]] = []
    for row, parts in zip(ids, recipes.PROMPTS[case], strict=True):
        at = 0

        def place(piece: Piece, placeholder: int, row=row) -> Piece:
            nonlocal at
            start = at + int(np.argmax(row[at:] == placeholder))
            at = start + piece.count
            assert (row[start:at] == placeholder).all()
            assert row[at] != placeholder
            return piece.at(start)

        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, recipes.Picture):
                pieces.append(place(patches_of(part.pixels(), vision, part.budget), vision.image_token_id))
            elif isinstance(part, recipes.Film):
                for picture in part.pictures():
                    frame = patches_of(picture.pixels(), vision, picture.budget, "video")
                    pieces.append(place(frame, vision.video_token_id))
            elif isinstance(part, recipes.Sound):
                assert audio is not None
                pieces.append(place(sound_piece(part.waveform()), audio.audio_token_id))
        found.append(pieces)
    return found

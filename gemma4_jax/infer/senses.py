"""What prompts see and hear, on its way into the chunks they are read in.

The towers look at one picture or sound at a time, when the first chunk that holds some of it is read. Its soft tokens wait in a
pool of fixed size, from which the chunk takes them by number: so the programs depend on budgets and chunk sizes, never on how
many pictures there are or how large.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.weights import Towers, placed
from gemma4_jax.media.batch import MediaShape, batch_media
from gemma4_jax.media.images import BUDGETS
from gemma4_jax.media.pieces import ImagePiece, Piece, SoundPiece, uncut
from gemma4_jax.media.sounds import BINS
from gemma4_jax.model.multimodal import Media, SoftTokens, soft_frames

FRAMES = (200, 600, 1500, 3000)
"""Frames of 10 ms that a sound is padded to; fewer sizes than in training, because each is a program to warm up."""

LONGEST = max(BUDGETS)
"""Soft tokens of the largest picture; the longest sound has 750."""

WHOLE_PICTURE = 1152
"""Size of a chunk for a picture that is larger than the usual chunks: what sees itself whole is read whole."""


class Senses:
    """The towers at work for one engine.

    Args:
        cfg: of the model.
        rows: most prompts in a chunk.
        width: most tokens of each.
    """

    def __init__(self, cfg: ModelConfig, rows: int, width: int) -> None:
        self._cfg = cfg
        # A row's tokens, with the parts of its first and last piece that belong to other chunks; the padding of the last one.
        self._room = rows * (width + (0 if cfg.sees_ahead else 2 * LONGEST)) + LONGEST
        self._towers: Towers | None = None
        self._pool: jax.Array | None = None

    def use(self, towers: Towers | None) -> None:
        """Looks with these from now on; None lets go of them."""
        self._towers, self._pool = towers, None

    def check(self, request: Request) -> None:
        """UserError if the model cannot take what a request has to be looked at."""
        for piece in request.media:
            picture = isinstance(piece, ImagePiece)
            tower = self._cfg.vision if picture else self._cfg.audio
            if tower is None:
                what = (
                    "images, but this model has no vision tower"
                    if picture
                    else "audio, but this model has no audio tower"
                )
                raise UserError(f"the prompt has {what}; load one that has it, without text_only.")
            eyes = self._cfg.vision
            if picture and eyes is not None and piece.cells.shape[1:] != (eyes.cell_patches, eyes.patch_values):
                raise UserError("the prompt's images are cut for another model; use the processor of this one.")

    def whole(self, request: Request, read: int, size: int) -> int:
        """How many of the next `size` tokens to read so that no picture which sees itself whole is split; at least one."""
        if not request.media or not self._cfg.sees_ahead:
            return size
        cut = uncut(request.media, read + size)
        if cut > read:
            return cut - read
        return next(p.start + p.count for p in request.media if p.start == read) - read

    def of_chunk(self, chosen: Sequence[tuple[Running, int, int]], shape: tuple[int, int]) -> SoftTokens | None:
        """The soft tokens in a chunk [rows, width]; None if it is all text.

        Args:
            chosen: (running, first token, number of tokens) of each row.
            shape: of the chunk.
        """
        if not any(_inside(running, first, size) for running, first, size in chosen):
            return None
        soft_index, block_ids = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        used = block = 0
        for row, (running, first, size) in enumerate(chosen):
            for number, piece in _inside(running, first, size):
                if number not in running.soft:
                    running.soft[number] = self._look(piece)
                self._pool = _put(self._begun(), running.soft[number], np.int32(used))
                start, stop = max(piece.start, first), min(piece.start + piece.count, first + size)
                here = slice(start - first, stop - first)
                soft_index[row, here] = used + np.arange(start, stop) - piece.start
                if isinstance(piece, ImagePiece):
                    block += 1
                    block_ids[row, here] = block
                used += piece.count
                if stop == piece.start + piece.count:
                    del running.soft[number]
        return self._tokens(soft_index, block_ids)

    def warm_up(self) -> None:
        """Compiles what looks and listens."""
        vision = self._cfg.vision
        pieces: list[Piece] = []
        if vision is not None:
            cells = np.zeros((1, vision.cell_patches, vision.patch_values), np.uint8)
            pieces += [ImagePiece(cells, 1, budget) for budget in BUDGETS]
        if self._cfg.audio is not None:
            pieces += [SoundPiece(np.zeros((frames, BINS), np.float32)) for frames in FRAMES]
        for piece in pieces:
            self._pool = _put(self._begun(), self._look(piece), np.int32(0))

    def blank(self, shape: tuple[int, int]) -> SoftTokens:
        """Soft tokens of a chunk without any, of the same shapes: for warming up."""
        return self._tokens(np.full(shape, -1, np.int32), np.zeros(shape, np.int32))

    def _tokens(self, soft_index: np.ndarray, block_ids: np.ndarray) -> SoftTokens:
        longest = min(soft_index.shape[1], LONGEST)
        return SoftTokens(self._begun(), soft_index, block_ids, longest)  # type: ignore[arg-type]

    def _begun(self) -> jax.Array:
        """The pool; made when it is first needed."""
        if self._pool is None:
            assert self._towers is not None
            empty = jnp.zeros((self._room, self._cfg.hidden_size), self._towers.compute_dtype)
            self._pool = placed(empty)
        return self._pool

    def _look(self, piece: Piece) -> jax.Array:
        """Soft tokens [S, D] of one piece and its padding."""
        assert self._towers is not None
        if isinstance(piece, ImagePiece):
            shape, length = MediaShape(((piece.budget, 1),)), piece.budget
        else:
            frames = next((size for size in FRAMES if size >= len(piece.mel)), len(piece.mel))
            shape, length = MediaShape((), 1, frames), soft_frames(frames)
        media = batch_media([[piece.at(0)]], length, self._cfg.vision, shape=shape)
        assert media is not None
        return _looked(self._towers, media)


def _inside(running: Running, first: int, size: int) -> list[tuple[int, Piece]]:
    """(number, piece) of the pieces with soft tokens among these tokens of a prompt."""
    pieces = enumerate(running.request.media)
    return [(number, p) for number, p in pieces if p.start < first + size and first < p.start + p.count]


@jax.jit
def _looked(towers: Towers, media: Media) -> jax.Array:
    return towers.soft_tokens(media).values


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool_MD: jax.Array, values_SD: jax.Array, at: np.ndarray) -> jax.Array:
    return jax.lax.dynamic_update_slice(pool_MD, values_SD.astype(pool_MD.dtype), (at, np.int32(0)))

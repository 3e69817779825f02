"""Pictures, sounds and prompts of the multimodal fixtures, made from seeds: needs numpy only, shared by generator and tests.

A prompt is a list of parts: an int is so many random text tokens, a `Picture`, a `Sound` or a `Film` is what stands there. What
is trained is chosen at random among the text tokens.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

RATE = 16_000


@dataclasses.dataclass(frozen=True)
class Picture:
    """A random picture: height and width in pixels, seed, soft-token budget."""

    height: int
    width: int
    seed: int
    budget: int = 70

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]: coarse blocks with fine noise, so that resizing has something to do at every scale."""
        rng = np.random.default_rng([1, self.seed])
        coarse = rng.integers(0, 200, (-(-self.height // 5), -(-self.width // 7), 3))
        blocks = coarse.repeat(5, 0).repeat(7, 1)[: self.height, : self.width]
        return (blocks + rng.integers(0, 56, blocks.shape)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Film:
    """A video of random pictures of one size."""

    frames: int
    height: int
    width: int
    seed: int

    def pictures(self) -> list[Picture]:
        """The frames."""
        return [Picture(self.height, self.width, self.seed + i) for i in range(self.frames)]


@dataclasses.dataclass(frozen=True)
class Sound:
    """Two tones and noise."""

    seconds: float
    seed: int

    def waveform(self) -> np.ndarray:
        """float32 at 16 kHz."""
        rng = np.random.default_rng([2, self.seed])
        t = np.arange(round(self.seconds * RATE)) / RATE
        low, high = rng.uniform(100, 600), rng.uniform(1000, 5000)
        tones = 0.4 * np.sin(2 * math.pi * low * t) + 0.2 * np.sin(2 * math.pi * high * t) * np.sin(3 * t)
        return (tones + 0.05 * rng.standard_normal(t.size)).astype(np.float32)


Part = int | Picture | Film | Sound
Row = list[Part]

WIDE, TALL, SMALL = Picture(40, 170, 1), Picture(200, 60, 2), Picture(5, 9, 3)

# Real patch size: sizes whose pixels are compared, exactly. Landscape, portrait, a strip, already the right size, tiny, large.
RESIZED = (
    Picture(300, 500, 10, 280),
    Picture(500, 300, 11, 280),
    Picture(1, 300, 12, 280),
    Picture(333, 2, 13, 70),
    Picture(768, 768, 14, 280),
    Picture(7, 11, 15, 140),
    Picture(480, 640, 16, 70),
    Picture(901, 1203, 17, 560),
    Picture(600, 800, 18, 1120),
    Picture(1, 1, 19, 140),
)

# The tiny tower: one picture of each budget, and odd shapes.
TOWER = (
    Picture(61, 83, 20, 70),
    Picture(90, 50, 21, 140),
    Picture(64, 64, 22, 280),
    Picture(120, 90, 23, 560),
    Picture(77, 100, 24, 1120),
    Picture(20, 300, 25, 70),
    Picture(280, 30, 26, 70),
    Picture(3, 2, 27, 70),
)

SOUNDS = (Sound(0.3, 30), Sound(1.0, 31), Sound(3.7, 32), Sound(30.0, 33), Sound(31.5, 34))

PROMPTS: dict[str, list[Row]] = {
    "images": [[6, WIDE, 9, TALL, 12], [11, SMALL, 20]],
    "sounds": [[5, Sound(0.3, 40), 4, Sound(1.0, 41), 14], [7, Sound(3.7, 42), 9]],
    "together": [[4, WIDE, 5, Sound(1.0, 43), 6, Film(3, 48, 64, 50), 8]],
    "film": [[4, Film(3, 48, 64, 50), 8, SMALL, 7]],
}
USED = {"media_e2b": ("images", "sounds", "together"), "media_31b": ("images", "film")}


def text_tokens(count: int, seed: list[int], below: int) -> np.ndarray:
    """Random ids of text, none of them special."""
    return np.random.default_rng([3, *seed]).integers(4, below, count)

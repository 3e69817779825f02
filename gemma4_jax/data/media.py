"""The pictures and sounds of a batch as the arrays a training step takes, of the same shape from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from gemma4_jax.config_media import VisionConfig
from gemma4_jax.data.chat import Encoded
from gemma4_jax.media.batch import MediaShape, batch_media
from gemma4_jax.media.frontend import FrontEnd
from gemma4_jax.media.pieces import shifted
from gemma4_jax.model.multimodal import Media

T = TypeVar("T")


@dataclass(frozen=True)
class MediaLayout:
    """How the media of a process's share of a batch are cut.

    Attributes:
        vision: sizes of the patches; None: no pictures.
        hears: whether there may be sounds.
        parts: micro-batches of a step; row i belongs to part i % parts. More than one: arrays have a dim in front for them.
        multiple_of: devices over which a process spreads the pictures, and the sounds, of a micro-batch.
    """

    vision: VisionConfig | None = None
    hears: bool = False
    parts: int = 1
    multiple_of: int = 1

    @classmethod
    def of(cls, front_end: FrontEnd, parts: int, multiple_of: int) -> "MediaLayout":
        """For what a front end reads."""
        return cls(front_end.vision, front_end.audio is not None, parts, multiple_of)

    @property
    def sees(self) -> bool:
        """Whether rows may have media at all."""
        return self.vision is not None or self.hears

    def micro_batches(self, rows: Sequence[T]) -> list[Sequence[T]]:
        """The rows of each micro-batch."""
        return [rows[part :: self.parts] for part in range(self.parts)]

    def collate(
        self, sequences: Sequence[Sequence[Encoded]], seq_len: int, room: MediaShape, share: tuple[int, int]
    ) -> Media:
        """The media of sequences of examples, each piece where its example lies.

        Args:
            sequences: of this process.
            seq_len: slots of a sequence.
            room: for pictures and sounds of each micro-batch.
            share: (index, count) of the processes that feed other sequences.
        """
        rows = []
        for examples in sequences:
            starts = np.cumsum([0, *(len(example) for example in examples)])
            pairs = zip(examples, starts, strict=False)
            rows.append([piece for example, start in pairs for piece in shifted(example.media, int(start))])
        made = [batch_media(part, seq_len, self.vision, shape=room, share=share) for part in self.micro_batches(rows)]
        return made[0] if self.parts == 1 else jax.tree.map(lambda *x: np.stack(x), *made)  # type: ignore[return-value]

"""What runs in each of the engine's slots."""

import dataclasses

import jax
import numpy as np

from gemma4_jax.infer.request import Running
from gemma4_jax.infer.sampler import Rules
from gemma4_jax.infer.steps import NOTHING, Controls

STOP_IDS = 16
"""Stop ids that a slot knows itself; those beyond are found when its tokens arrive here."""


@dataclasses.dataclass
class Slots:
    """What runs in each slot, and how it draws; row b of every array is slot b."""

    running: list[Running | None]
    controls: Controls
    ended: np.ndarray

    @classmethod
    def empty(cls, count: int) -> "Slots":
        ones = np.ones(count, np.float32)
        rules = Rules(ones * 0, np.zeros(count, np.int32), ones, ones * 0)  # pyright: ignore[reportArgumentType]
        controls = Controls(
            rules, np.zeros(count, np.uint32), np.zeros(count, np.int32), np.full((count, STOP_IDS), NOTHING, np.int32)
        )
        return cls([None] * count, controls, np.zeros(count, bool))

    def enter(self, slot: int, running: Running) -> None:
        """The slot draws as this request says."""
        request, rules = running.request, self.controls.rules
        self.running[slot], running.slot = running, slot
        for name, value in dataclasses.asdict(request.rule).items():
            getattr(rules, name)[slot] = min(value, 2**31 - 1)
        self.controls.seeds[slot], self.controls.streams[slot] = request.seed, request.stream
        self.controls.stop_ids[slot] = NOTHING
        few = request.stop_ids[:STOP_IDS]
        self.controls.stop_ids[slot, : len(few)] = few

    def leave(self, slot: int) -> None:
        """The slot is free; it writes nothing until the next request has been read."""
        running = self.running[slot]
        if running is not None:
            running.slot = None
        self.running[slot], self.ended[slot] = None, True

    def of(self, rows: np.ndarray) -> Controls:
        """The controls of these slots, for programs with a row for each."""
        return jax.tree.map(lambda x: x[np.minimum(rows, len(self.running) - 1)], self.controls)

"""Several examples share a sequence, told apart by segment ids; positions start at 0 in each.

Best fit, longest first: each example goes where it leaves the least room. Which examples share a sequence follows from
their lengths alone, so every process can work it out for all processes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_jax.data.chat import Encoded

Batch = dict[str, Any]
"""numpy arrays as `collate` makes them, and under "media" a `Media` of them where there are some."""


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Groups of indices into `lengths`, each of total length at most `seq_len`, ordered by their first index."""
    room: list[tuple[int, int]] = []  # (slots left, group), sorted
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if not 0 < length <= seq_len:
            raise ValueError(f"An example to pack has 1 to {seq_len} tokens, got {length}.")
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, group = room.pop(place)
            groups[group].append(index)
        else:
            left, group = seq_len, len(groups)
            groups.append([index])
        if left > length:
            insort(room, (left - length, group))
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def collate(sequences: Sequence[Sequence[Encoded]], seq_len: int, pad: int) -> Batch:
    """Sequences of examples as arrays; an empty sequence is a row of padding.

    Returns:
        tokens int32 [B, T], `pad` where empty; positions int32 [B, T], -1 where empty; segment_ids int32 [B, T], 1 and up,
        0 where empty; targets int32 [B, T], the token after each; loss_weights float32 [B, T], 1 where the target is trained.
    """
    shape = (len(sequences), seq_len)
    batch = {
        "tokens": np.full(shape, pad, np.int32),
        "positions": np.full(shape, -1, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "targets": np.full(shape, pad, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
    }
    for row, examples in enumerate(sequences):
        start = 0
        for segment, example in enumerate(examples, 1):
            slots = slice(start, start + len(example))
            batch["tokens"][row, slots] = example.tokens[:-1]
            batch["targets"][row, slots] = example.tokens[1:]
            batch["positions"][row, slots] = np.arange(len(example))
            batch["segment_ids"][row, slots] = segment
            batch["loss_weights"][row, slots] = example.trained
            start += len(example)
    return batch

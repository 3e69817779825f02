"""Which attention kernel runs where: the one table.

`model/attend.py` builds programs from it, `task=plan` prints from it. The platform is that of the compiled program, not
of the machine that traces it.

cuDNN's fused attention is not in the table. It takes heads up to 256 only, and it would have to know when tracing that
there is neither packing nor padding, which stand in arrays here; GPUs run the XLA kernels.

Bidirectional attention inside an image (sliding layers of 26B and 31B; the block sees forward, the window still bounds
what lies behind) fits all three: an image is a run of slots, so each query gets, next to its slot, the slot where its
run ends, and "key slot <= query slot" becomes "key slot <= end of run". For splash that is one more array beside
`q_sequence` and a schedule that looks `longest image` slots ahead; for the XLA kernels one more label and wider spans.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one device computes: queries and keys it holds (halo or gathered keys included), head dim, window.

    `aligned`: keys and queries are tokens of one sequence in slots, so that a query sees nothing after its own slot.
    Keys may begin before the queries (a halo) or be those of the whole sequence.
    """

    length: int
    keys: int
    head_dim: int
    window: int | None
    aligned: bool


class Kernel(NamedTuple):
    """A row of the table."""

    name: str
    platforms: tuple[str, ...]
    can: Callable[[Shape], bool]
    cost: str


def _has_band(x: Shape) -> bool:
    """Whether the window leaves keys out in a way that is known when tracing: on one device, or with a whole halo."""
    if x.window is None:
        return False
    return x.length > x.window if x.keys == x.length else x.keys - x.length >= x.window - 1


EVERYWHERE = ("tpu", "cuda", "rocm", "cpu")

KERNELS = (
    Kernel(
        "splash",
        ("tpu",),
        lambda x: x.aligned and x.head_dim % 128 == 0 and x.length % 128 == 0 and x.keys % 128 == 0,
        "Pallas; visits only blocks that causality and the window leave",
    ),
    Kernel(
        "banded",
        EVERYWHERE,
        lambda x: x.aligned and _has_band(x),
        "XLA; O(length x window)",
    ),
    Kernel("chunked", EVERYWHERE, lambda x: True, "XLA; 128 queries at a time against all keys before them"),
)
"""The first row that lists the platform and can compute the shape is the choice."""


def kernel_choice(platform: str, shape: Shape) -> str:
    """Name of the kernel that runs on "tpu", "cuda", "rocm" or "cpu" ("gpu" means "cuda")."""
    platform = "cuda" if platform == "gpu" else platform
    if platform not in EVERYWHERE:
        raise ValueError(f"platform is one of {', '.join(EVERYWHERE)}, got {platform!r}")
    return next(row.name for row in KERNELS if platform in row.platforms and row.can(shape))

"""Which attention kernel runs where: the one table.

`model/attend.py` builds programs from it, `task=plan` prints from it. The platform is that of the compiled program, not
of the machine that traces it.

cuDNN's fused attention is not in the table. It takes heads up to 256 only, and it would have to know when tracing that
there is neither packing nor padding, which stand in arrays here; GPUs run the XLA kernels.

Bidirectional attention inside an image (sliding layers of 26B and 31B; the image sees forward, the window still bounds
what lies behind): an image is a run of slots, so each query gets, next to its position, that of the end of its run, and "key
<= query" becomes "key <= end of run". For the XLA kernels that is one more label and wider spans. Splash's mask is a
function of slots, known when compiling, and has no room for it: sliding layers of a sequence with images run the XLA kernels
on TPU too, full layers and all text run splash.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one device computes: queries and keys it holds (halo or gathered keys included), head dim, window.

    `aligned`: keys and queries are tokens of one sequence in slots, so that a query sees nothing after its own slot.
    Keys may begin before the queries (a halo) or be those of the whole sequence. `ahead`: slots after its own that a query
    may see, as many as the longest image has.
    """

    length: int
    keys: int
    head_dim: int
    window: int | None
    aligned: bool
    ahead: int = 0


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
    return x.length > x.window if x.keys == x.length else not x.ahead and x.keys - x.length >= x.window - 1


EVERYWHERE = ("tpu", "cuda", "rocm", "cpu")

KERNELS = (
    Kernel(
        "splash",
        ("tpu",),
        lambda x: x.aligned and not x.ahead and x.head_dim % 128 == 0 and x.length % 128 == 0 and x.keys % 128 == 0,
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

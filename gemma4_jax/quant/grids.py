"""Number grids for weights by name: small integer codes times one scale per block.

A grid is a frozen dataclass: it stands in the static part of a module, so jit compiles anew for another grid. Encoding, decoding
and fake quantisation are one rule, so what training sees is bit for bit (float32) what a file holds.

| name          | codes      | scale               | relative RMS error on normal weights | holds it |
| q4_0          | -8..7      | float16, 32 weights | 8.60 % | GGUF Q4_0 |
| q4_0_bf16     | -8..7      | float16, 32 weights | 8.56 % | GGUF Q4_0; bfloat16 holds the values too |
| int4_sym7_g32 | -7..7      | float16, 32 weights | 9.54 % | compressed-tensors W4A16, GGUF Q4_0, bfloat16 |
| q8_0          | -127..127  | float16, 32 weights | 0.54 % | GGUF Q8_0 |
| int8_channel  | -127..127  | float32, channel    | 0.81 % (1,536 in a channel) | compressed-tensors, mobile |
| int4_channel  | -8..7      | float32, channel    | 10.9 % | mobile |
| int2_channel  | -2..1      | float32, channel    | 38.7 % | mobile |
| int4_b256     | -8..7      | float32, 256 weights | 10.8 % | mobile, per-layer embeddings; any block: int4_b128 |
"""

import re

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.quant.block_grids import INT4_SYM7_G32, Q4_0, Q4_0_BF16, Q8_0
from gemma4_jax.quant.blocks import BlockGrid
from gemma4_jax.quant.channel_grids import INT2_CHANNEL, INT4_CHANNEL, INT8_CHANNEL, int4_blocks

__all__ = [
    "GRIDS",
    "INT2_CHANNEL",
    "INT4_B256",
    "INT4_CHANNEL",
    "INT4_SYM7_G32",
    "INT8_CHANNEL",
    "Q4_0",
    "Q4_0_BF16",
    "Q8_0",
    "BlockGrid",
    "grid_named",
    "int4_blocks",
]

INT4_B256 = int4_blocks(256)

_ALL = (Q4_0, Q4_0_BF16, INT4_SYM7_G32, Q8_0, INT8_CHANNEL, INT4_CHANNEL, INT2_CHANNEL, INT4_B256)
GRIDS: dict[str, BlockGrid] = {grid.name: grid for grid in _ALL}
"""Every grid by the name that configs use; `int4_bN` exists for every N."""


def grid_named(name: str) -> BlockGrid:
    """The grid of that name; a UserError suggests the nearest."""
    if name in GRIDS:
        return GRIDS[name]
    if found := re.fullmatch(r"int4_b([1-9]\d*)", name):
        return int4_blocks(int(found[1]))
    raise UserError(f"Unknown grid {name!r}; {did_you_mean(name, GRIDS)}")

"""Grids with one float32 scale per output channel (or per wide block of it), as the mobile format and int8 files have them.

Scales have 8 significant bits: exact in bfloat16 too, and a code times a scale is exact in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gemma4_jax.quant.blocks import BlockGrid, inverse


@dataclasses.dataclass(frozen=True)
class AbsmaxGrid(BlockGrid):
    """Codes -127..127 and scale absmax / 127; quantising the values again gives the same codes and scales.

    Error on normally distributed weights 0.81 % for 1,536 of them in a channel, 0.87 % for 4,096.
    """

    def storable(self, scale):
        return eight_bits(scale)

    def _quantise(self, x, axis):
        scale = eight_bits(jnp.max(jnp.abs(x), axis, keepdims=True) * (1.0 / self.highest))
        return self._codes(x, scale), scale


@dataclasses.dataclass(frozen=True)
class DeviationGrid(BlockGrid):
    """Few codes, so the extremes are clipped: scale = `step` times the root mean square of the channel.

    `step` has the least squared error on normally distributed weights, whatever the length of the channel:

    | codes | step | error   | with scale absmax / highest, 1,536 in a channel |
    | -8..7 | 0.34 | 10.89 % | 14.8 % |
    | -2..1 | 1.05 | 38.66 % | above 100 % |

    Not absmax times a factor: the best factor depends on the length. The values of a file, quantised again, have another root mean
    square and so another scale: files are written from codes, never from values.
    """

    step: float = 1.0

    def storable(self, scale):
        return eight_bits(scale)

    def _quantise(self, x, axis):
        magnitude = jnp.abs(x)
        unit = jnp.max(magnitude, axis, keepdims=True) * (1.0 / 127)
        # In whole numbers, whose sum is the same in every order: a device may add up a row as it likes and the scale stays.
        # Below 2^31 for 133,000 weights in a channel; too large a largest weight by 0.01 %.
        parts = jnp.round(magnitude * inverse(unit))
        parts = jnp.where(jnp.isfinite(parts), parts, 0.0).astype(jnp.int32)
        squares = jnp.sum(parts * parts, axis, keepdims=True).astype(jnp.float32)
        scale = eight_bits(unit * jnp.sqrt(squares * (self.step**2 / x.shape[axis])))
        return self._codes(x, scale), scale


def eight_bits(scale: jax.Array) -> jax.Array:
    """float32 rounded to 8 significant bits, to nearest even; subnormals to 0."""
    return jax.lax.reduce_precision(scale, 8, 7)


INT8_CHANNEL = AbsmaxGrid("int8_channel", block=None, code_bits=8, lowest=-127, highest=127, scale_bits=32)
INT4_CHANNEL = DeviationGrid("int4_channel", block=None, code_bits=4, lowest=-8, highest=7, scale_bits=32, step=0.34)
INT2_CHANNEL = DeviationGrid("int2_channel", block=None, code_bits=2, lowest=-2, highest=1, scale_bits=32, step=1.05)


def int4_blocks(block: int) -> BlockGrid:
    """`int4_b256` and its like: int4_channel with a scale for every `block` weights, for tables of per-layer embeddings."""
    return dataclasses.replace(INT4_CHANNEL, name=f"int4_b{block}", block=block)

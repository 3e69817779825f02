"""Grids with a scale for every 32 weights, as ggml and compressed-tensors have them. Scales are float16."""

import dataclasses

import jax
import jax.numpy as jnp

from gemma4_jax.quant.blocks import BlockGrid, inverse

SMALLEST = 2.0**-20
"""Below, float16 has fewer than 5 bits: scales of 5 significant bits are at least this, and smaller weights use fewer codes."""
LARGEST = 63488.0
"""31 * 2^11, float16's last number of 5 significant bits."""


@dataclasses.dataclass(frozen=True)
class SignedExtremumGrid(BlockGrid):
    """ggml's Q4_0: the weight of largest magnitude gets code -8, so the scale carries its sign; codes -8..7.

    Bit-identical to ggml's reference quantiser where float32 division is IEEE's (CPU and GPU; a TPU may move a tie). Codes come
    from the unrounded scale, values from the float16 one. ggml stores code + 8. Source: ggml `quantize_row_q4_0_ref`.
    Error 8.60 % on normally distributed weights.
    """

    def storable(self, scale):
        return to_float16(scale)

    def _quantise(self, x, axis):
        d = self._signed_extremum(x, axis) * -0.125
        # The clip never binds on finite weights. It keeps x * inverse + 8.5 from becoming one fused multiply-add, which rounds
        # once where ggml rounds twice (XLA fuses them on CPU, even through an optimization_barrier).
        code = jnp.minimum(jnp.floor(jnp.clip(x * inverse(d), -16.0, 16.0) + 8.5), 15.0) - 8.0
        return jnp.where(jnp.isnan(code), 0.0, code).astype(jnp.int8), to_float16(d)

    def _signed_extremum(self, x: jax.Array, axis: int) -> jax.Array:
        """The weight of largest magnitude of each block; of two the first."""
        magnitude = jnp.abs(x)
        largest = jnp.max(magnitude, axis, keepdims=True)
        # One integer holds both, position above sign.
        place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) * 2 + (x < 0).astype(jnp.int32)
        first = jnp.min(jnp.where(magnitude == largest, place, 2 * x.shape[axis]), axis, keepdims=True)
        return jnp.where(first % 2 == 1, -largest, largest)


@dataclasses.dataclass(frozen=True)
class PortableExtremumGrid(SignedExtremumGrid):
    """Q4_0 that bfloat16 holds too: extremum / -8 with its magnitude rounded down to 5 significant bits; codes -8..7.

    A code times such a scale fits bfloat16's 8 significant bits, so weights stored in bfloat16 are on the grid, and ggml's own
    quantiser, run on them, finds the same codes and scales (the extremum still has code -8): any converter writes the right Q4_0
    file. Down, because clipping a little costs less than coarser steps: error 8.56 % on normally distributed weights, against
    8.59 % with an exact scale and 8.62 % with the nearest of 5 bits.
    """

    def storable(self, scale):
        return jnp.where(scale < 0, -1.0, 1.0) * five_bits(jnp.abs(scale))

    def _quantise(self, x, axis):
        d = self._signed_extremum(x, axis) * -0.125
        scale = jnp.where(d == 0, 0.0, self.storable(d))
        return self._codes(x, scale), scale


@dataclasses.dataclass(frozen=True)
class SymmetricGrid(BlockGrid):
    """Codes -7..7 and a positive scale: the portable grid, which GGUF Q4_0, compressed-tensors and MLX all hold as it is.

    The scale is absmax / 7 rounded down to 5 significant bits. It is exact in float16 and bfloat16, and a 3-bit code times it
    fits the 8 significant bits of bfloat16: weights stored in bfloat16 are on the grid, and quantising them again gives the same
    codes and scales. Error 9.54 % on normally distributed weights, against 9.70 % with an exact scale and 9.72 % with the nearest
    of 5 bits; absmax still rounds to 7.
    """

    def storable(self, scale):
        return five_bits(scale)

    def _quantise(self, x, axis):
        # float32(1/7) lies above 1/7, so absmax = 7 * scale gives scale again; a true division may be compiled to this anyway.
        scale = five_bits(jnp.max(jnp.abs(x), axis, keepdims=True) * (1.0 / self.highest))
        return self._codes(x, scale), scale


@dataclasses.dataclass(frozen=True)
class EightBitGrid(BlockGrid):
    """ggml's Q8_0: codes -127..127, scale absmax / 127; ties round away from 0. Source: ggml `quantize_row_q8_0_ref`.

    Bit-identical to it where float32 division is IEEE's. Codes come from the unrounded scale, values from the float16 one.
    Error 0.54 % on normally distributed weights.
    """

    def storable(self, scale):
        return to_float16(scale)

    def _quantise(self, x, axis):
        largest = jnp.max(jnp.abs(x), axis, keepdims=True)
        # A constant divisor would be compiled to a product with 1/127, which rounds otherwise.
        d = largest / jnp.where(largest == 0, 1.0, 127.0)
        code = jax.lax.round(x * inverse(d), jax.lax.RoundingMethod.AWAY_FROM_ZERO)
        return jnp.where(jnp.isnan(code), 0.0, jnp.clip(code, -127.0, 127.0)).astype(jnp.int8), to_float16(d)


def five_bits(magnitude: jax.Array) -> jax.Array:
    """Positive float32 rounded down to 5 significant bits, at least SMALLEST; infinity beyond LARGEST."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFF80000), jnp.float32)
    return jnp.maximum(jnp.where(scale > LARGEST, jnp.inf, scale), SMALLEST)


def to_float16(x: jax.Array) -> jax.Array:
    """float32 rounded to what float16 holds, subnormals included, to nearest even; overflow gives infinity.

    In arithmetic, since compilers may drop a conversion there and back, and `reduce_precision` alone flushes subnormals.
    """
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, 5, 10))


Q4_0 = SignedExtremumGrid("q4_0", block=32, code_bits=4, lowest=-8, highest=7)
Q4_0_BF16 = PortableExtremumGrid("q4_0_bf16", block=32, code_bits=4, lowest=-8, highest=7)
INT4_SYM7_G32 = SymmetricGrid("int4_sym7_g32", block=32, code_bits=4, lowest=-7, highest=7)
Q8_0 = EightBitGrid("q8_0", block=32, code_bits=8, lowest=-127, highest=127)

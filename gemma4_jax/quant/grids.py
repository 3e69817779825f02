"""Number grids for weights: small integer codes times one scale per block.

A grid is a frozen dataclass: it stands in the static part of a module, so jit compiles anew for another grid. Encoding, decoding
and fake quantisation are one rule, so what training sees is bit for bit (float32) what a file holds.

Relative RMS error on normally distributed weights: q4_0 8.60 %, int4_sym7_g32 9.54 %.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class BlockGrid(abc.ABC):
    """value = code * scale, with one scale for `block` neighbours along an axis.

    Codes are signed integers of `code_bits` in int8; file formats that store them with an offset add it when they pack.
    Scales are float16, as files have them. Computes in float32 on every dtype of weight.

    A block that holds NaN or infinity, or that is too large for a float16 scale, decodes to values that are not finite:
    nothing is hidden. Subnormal float32 weights count as 0.
    """

    name: str
    block: int
    code_bits: int
    scale_bits: int = 16

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, its share of the scale included."""
        return self.code_bits + self.scale_bits / self.block

    def check(self, shape: tuple[int, ...], axis: int) -> None:
        """UserError unless `shape` divides into blocks along `axis`."""
        if shape[axis] % self.block:
            raise UserError(
                f"{self.name} wants a multiple of {self.block} along the input dim, got {shape[axis]} (axis {axis} of "
                f"{tuple(shape)}); leave this group out of quant.cover or choose a grid with smaller blocks."
            )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def encode(self, w: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        """int8 codes of w's shape, and float16 scales with shape[axis] / block entries along `axis`."""
        codes, scale = self._quantise(self._blocks(w.astype(jnp.float32), axis), axis % w.ndim + 1)
        return codes.reshape(w.shape), scale.squeeze(axis % w.ndim + 1).astype(jnp.float16)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def decode(self, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
        """float32 values; exact, since a code and a float16 scale multiply without rounding."""
        scale = jnp.expand_dims(scale.astype(jnp.float32), axis % codes.ndim + 1)
        return (self._blocks(codes, axis).astype(jnp.float32) * scale).reshape(codes.shape)

    def fake_quant(self, w: jax.Array, axis: int) -> jax.Array:
        """decode(encode(w)) in the dtype of w; the gradient passes straight through, unchanged."""
        return _straight_through(self, axis, w)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def round(self, w: jax.Array, axis: int) -> jax.Array:
        """decode(encode(w)) in the dtype of w, gradient undefined: the forward pass of `fake_quant`."""
        codes, scale = self._quantise(self._blocks(w.astype(jnp.float32), axis), axis % w.ndim + 1)
        return (codes.astype(jnp.float32) * scale).reshape(w.shape).astype(w.dtype)

    def _blocks(self, w: jax.Array, axis: int) -> jax.Array:
        """w with `axis` split into [blocks, block]; nothing moves in memory."""
        self.check(w.shape, axis)
        axis %= w.ndim
        return w.reshape(*w.shape[:axis], w.shape[axis] // self.block, self.block, *w.shape[axis + 1 :])

    @abc.abstractmethod
    def _quantise(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        """int8 codes of float32 x and float32 scales (size 1 along `axis`, exact in float16); each `axis` is one block."""


# Not w + stop_gradient(q(w) - w): that rounds twice more, and the forward pass would leave the grid in the last bit.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(grid: BlockGrid, axis: int, w: jax.Array) -> jax.Array:
    return grid.round(w, axis)


@_straight_through.defjvp
def _pass_tangent(grid, axis, primals, tangents):
    return _straight_through(grid, axis, *primals), tangents[0]


@dataclasses.dataclass(frozen=True)
class SignedExtremumGrid(BlockGrid):
    """ggml's Q4_0: the weight of largest magnitude gets code -8, so the scale carries its sign; codes -8..7.

    Bit-identical to ggml's reference quantiser where float32 division is IEEE's (CPU and GPU; a TPU may move a tie). Codes come
    from the unrounded scale, values from the float16 one. ggml stores code + 8. Source: ggml `quantize_row_q4_0_ref`.
    """

    def _quantise(self, x, axis):
        magnitude = jnp.abs(x)
        largest = jnp.max(magnitude, axis, keepdims=True)
        # Two of equal magnitude: the first one's sign counts. One integer holds both, position above sign.
        place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) * 2 + (x < 0).astype(jnp.int32)
        first = jnp.min(jnp.where(magnitude == largest, place, 2 * self.block), axis, keepdims=True)
        d = jnp.where(first % 2 == 1, -largest, largest) * -0.125
        inverse = jnp.where(d == 0, 0.0, 1.0 / d)
        # The clip never binds on finite weights. It keeps x * inverse + 8.5 from becoming one fused multiply-add, which rounds
        # once where ggml rounds twice (XLA fuses them on CPU, even through an optimization_barrier).
        code = jnp.minimum(jnp.floor(jnp.clip(x * inverse, -16.0, 16.0) + 8.5), 15.0) - 8.0
        return _int8(code), _to_float16(d)


@dataclasses.dataclass(frozen=True)
class SymmetricGrid(BlockGrid):
    """Codes -top..top and a positive scale: the portable grid, which GGUF Q4_0, compressed-tensors and MLX all hold as it is.

    The scale is absmax / top rounded down to 5 significant bits. It is exact in float16 and bfloat16, and a 3-bit code times it
    fits the 8 significant bits of bfloat16: weights stored in bfloat16 are on the grid, and quantising them again gives the same
    codes and scales. Down, because clipping a little costs less than coarser steps: error 9.54 % on normally distributed
    weights, against 9.70 % with an exact scale and 9.72 % with the nearest of 5 bits; absmax still rounds to `top`.

    Scales are at least 2^-20: below, float16 has fewer than 5 bits. Blocks of smaller weights use fewer codes, or only 0.
    """

    top: int = 7

    def _quantise(self, x, axis):
        largest = jnp.max(jnp.abs(x), axis, keepdims=True)
        # float32(1/7) lies above 1/7, so absmax = 7 * scale gives scale again; a true division may be compiled to this anyway.
        bits = jax.lax.bitcast_convert_type(largest * (1.0 / self.top), jnp.uint32)
        scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFF80000), jnp.float32)
        scale = jnp.maximum(jnp.where(scale > 63488.0, jnp.inf, scale), 2.0**-20)  # 63488 = 31 * 2^11, float16's last
        return _int8(jnp.clip(jnp.round(x * (1.0 / scale)), -self.top, self.top)), scale


def _int8(code: jax.Array) -> jax.Array:
    """Whole floats to int8; NaN to 0, whose block has a scale that is not finite either."""
    return jnp.where(jnp.isnan(code), 0.0, code).astype(jnp.int8)


def _to_float16(x: jax.Array) -> jax.Array:
    """float32 rounded to what float16 holds, subnormals included, to nearest even; overflow gives infinity.

    In arithmetic, since compilers may drop a conversion there and back, and `reduce_precision` alone flushes subnormals.
    """
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, 5, 10))


Q4_0 = SignedExtremumGrid("q4_0", block=32, code_bits=4)
INT4_SYM7_G32 = SymmetricGrid("int4_sym7_g32", block=32, code_bits=4)

GRIDS: dict[str, BlockGrid] = {grid.name: grid for grid in (Q4_0, INT4_SYM7_G32)}
"""Every grid by the name that configs use."""


def grid_named(name: str) -> BlockGrid:
    """The grid of that name; a UserError suggests the nearest."""
    if name not in GRIDS:
        raise UserError(f"Unknown grid {name!r}; {did_you_mean(name, GRIDS)}")
    return GRIDS[name]

"""What every grid for weights is: small integer codes times one scale per block of neighbours, and one rule to find both."""

import abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BlockGrid(abc.ABC):
    """value = code * scale, with one scale for `block` neighbours along an axis; block None: for the whole axis (a channel).

    Codes are integers lowest..highest in int8; file formats that store them with an offset add it when they pack. Scales are
    float16 or float32, as files have them (`scale_bits`). Computes in float32 on every dtype of weight.

    A block that holds NaN or infinity, or that is too large for its scale, decodes to values that are not finite: nothing is
    hidden. Subnormal float32 weights count as 0.

    `clipped` is about training alone: the gradient of weights beyond the last code is 0 in place of passing through.
    """

    name: str
    block: int | None
    code_bits: int
    lowest: int
    highest: int
    scale_bits: int = 16
    clipped: bool = False

    def bits(self, shape: tuple[int, ...], axis: int) -> int:
        """Storage of a weight of this shape: codes and scales."""
        size, width = math.prod(shape), self.block or shape[axis]
        return size * self.code_bits + size // width * self.scale_bits

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, its share of the scale included; of a channel's scale nothing, for its length is not known."""
        return self.code_bits + (self.scale_bits / self.block if self.block else 0)

    @property
    def scale_dtype(self) -> jnp.dtype:
        """What `encode` gives scales in."""
        return jnp.dtype(jnp.float16 if self.scale_bits == 16 else jnp.float32)

    def check(self, shape: tuple[int, ...], axis: int) -> None:
        """UserError unless `shape` divides into blocks along `axis`."""
        if self.block and shape[axis] % self.block:
            raise UserError(
                f"{self.name} wants a multiple of {self.block} along the input dim, got {shape[axis]} (axis {axis} of "
                f"{tuple(shape)}); leave this group out of quant.cover or choose a grid with smaller blocks."
            )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def encode(self, w: jax.Array, axis: int, scale: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """int8 codes of w's shape, and scales of `scale_dtype` with one entry per block along `axis` (1 of a channel).

        The grid's rule finds the scales, unless float32 ones of that shape are given (learned ones).
        """
        codes, found = self._both(w, axis, scale)
        return codes.reshape(w.shape), found.squeeze(axis % w.ndim + 1).astype(self.scale_dtype)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def decode(self, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
        """float32 values; exact, since a code and a scale multiply without rounding."""
        scale = jnp.expand_dims(scale.astype(jnp.float32), axis % codes.ndim + 1)
        return (self._blocks(codes, axis).astype(jnp.float32) * scale).reshape(codes.shape)

    def fake_quant(self, w: jax.Array, axis: int, scale: jax.Array | None = None) -> jax.Array:
        """decode(encode(w)) in the dtype of w, to be differentiated.

        The gradient of w passes straight through, or with `clipped` where w lies between the first and the last code. That of
        given scales is LSQ's (arXiv 1902.08153, equation 3 and section 2.2): code - w / scale within the codes, the last code
        beyond, all over the root of block * highest, so that scales and weights have gradients of one size.
        """
        if scale is None:
            return _straight_through(self, axis, w)
        return _learned(self, axis, w, scale)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def round(self, w: jax.Array, axis: int, scale: jax.Array | None = None) -> jax.Array:
        """decode(encode(w)) in the dtype of w, gradient undefined: the forward pass of `fake_quant`."""
        codes, scale = self._both(w, axis, scale)
        return (codes.astype(jnp.float32) * scale).reshape(w.shape).astype(w.dtype)

    @abc.abstractmethod
    def storable(self, scale: jax.Array) -> jax.Array:
        """float32 scales as a file holds them: products with codes are exact."""

    @abc.abstractmethod
    def _quantise(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        """int8 codes of float32 x and storable float32 scales (size 1 along `axis`); each `axis` is one block."""

    def _codes(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """int8 codes to the nearest, given scales; NaN to 0, whose block has a scale that is not finite either."""
        code = jnp.clip(jnp.round(x * inverse(scale)), self.lowest, self.highest)
        return jnp.where(jnp.isnan(code), 0.0, code).astype(jnp.int8)

    def _both(self, w: jax.Array, axis: int, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of w in blocks."""
        blocks, inner = self._blocks(w.astype(jnp.float32), axis), axis % w.ndim + 1
        if scale is None:
            return self._quantise(blocks, inner)
        scale = self.storable(jnp.expand_dims(scale.astype(jnp.float32), inner))
        return self._codes(blocks, scale), scale

    def _within(self, w: jax.Array, axis: int, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """w / scale in blocks, and where it rounds to a code without being clipped."""
        _, scale = self._both(w, axis, scale)
        place = self._blocks(w.astype(jnp.float32), axis) * inverse(scale)
        return place, (place > self.lowest - 0.5) & (place < self.highest + 0.5)

    def _blocks(self, w: jax.Array, axis: int) -> jax.Array:
        """w with `axis` split into [blocks, block]; nothing moves in memory."""
        self.check(w.shape, axis)
        axis %= w.ndim
        block = self.block or w.shape[axis]
        return w.reshape(*w.shape[:axis], w.shape[axis] // block, block, *w.shape[axis + 1 :])


def inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 for 0: the codes of a block of zeros are 0."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


# Not w + stop_gradient(q(w) - w): that rounds twice more, and the forward pass would leave the grid in the last bit.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(grid: BlockGrid, axis: int, w: jax.Array) -> jax.Array:
    return grid.round(w, axis)


@_straight_through.defjvp
def _pass_tangent(grid, axis, primals, tangents):
    (w,), (tangent,) = primals, tangents
    if grid.clipped:
        _, within = grid._within(w, axis, None)
        tangent = jnp.where(within.reshape(w.shape), tangent, jnp.zeros((), tangent.dtype))
    return _straight_through(grid, axis, w), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _learned(grid: BlockGrid, axis: int, w: jax.Array, scale: jax.Array) -> jax.Array:
    return grid.round(w, axis, scale)


@_learned.defjvp
def _lsq_tangent(grid, axis, primals, tangents):
    (w, scale), (w_tangent, scale_tangent) = primals, tangents
    place, within = grid._within(w, axis, scale)
    if grid.clipped:
        w_tangent = jnp.where(within.reshape(w.shape), w_tangent, jnp.zeros((), w_tangent.dtype))
    code = jnp.clip(jnp.round(place), grid.lowest, grid.highest)
    slope = jnp.where(within, code - place, code) * ((grid.block or w.shape[axis]) * grid.highest) ** -0.5
    by_scale = slope * jnp.expand_dims(scale_tangent.astype(jnp.float32), axis % w.ndim + 1)
    return _learned(grid, axis, w, scale), w_tangent + by_scale.reshape(w.shape).astype(w.dtype)

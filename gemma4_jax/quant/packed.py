"""Codes of a grid as they stay in memory, several in a byte, where they are not trained: to sample from, and as QLoRA's base.

The same bits as in compressed-tensors and mobile files: the first code in the lowest bits, each stored as code + 2^(bits - 1).
"""

import dataclasses

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError
from gemma4_jax.quant.blocks import BlockGrid


@dataclasses.dataclass(frozen=True)
class Packed:
    """How to read packed codes of a grid; bytes run along the axis that blocks run along."""

    grid: BlockGrid

    @property
    def name(self) -> str:
        """The grid's."""
        return self.grid.name

    @property
    def per_byte(self) -> int:
        """Codes in a byte: 4, 2 or 1."""
        return 8 // self.grid.code_bits

    def check(self, count: int) -> None:
        """UserError unless `count` codes in a row fill whole bytes."""
        if count % self.per_byte:
            raise UserError(
                f"{self.name} has {self.per_byte} codes in a byte, which {count} codes of a weight do not fill: hold it in 8 "
                "bits (lora.base=int8), or in float (lora.base=none, sample.packed=false)."
            )

    def pack(self, codes: jax.Array, axis: int) -> jax.Array:
        """int8 codes to uint8, `per_byte` times shorter along `axis`. UserError where they do not fill whole bytes."""
        bits, count, axis = self.grid.code_bits, self.per_byte, axis % codes.ndim
        self.check(codes.shape[axis])
        # XOR of the highest bit adds 2^(bits - 1) to a number in two's complement.
        stored = (codes.astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)) ^ jnp.uint8(self._middle)
        parts = jnp.moveaxis(stored.reshape(*codes.shape[:axis], -1, count, *codes.shape[axis + 1 :]), axis + 1, 0)
        out = parts[0]
        for place in range(1, count):
            out = out | (parts[place] << jnp.uint8(bits * place))
        return out

    def codes(self, packed: jax.Array, axis: int) -> jax.Array:
        """The int8 codes that `pack` was given."""
        axis %= packed.ndim
        parts = jnp.stack(self._stored(packed), axis=axis + 1)
        stored = parts.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
        return (stored.astype(jnp.int16) - jnp.int16(self._middle)).astype(jnp.int8)

    def decode(self, packed: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
        """float32 values; `scale` has one entry per block along `axis`, as the grid's `encode` gives them."""
        return self.grid.decode(self.codes(packed, axis), scale, axis)

    def dot(self, x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
        """x [..., inputs] times the values of codes [inputs / per_byte, outputs] with scales [blocks, outputs], in x's dtype.

        The codes at one place of all bytes are a matrix of their own, which meets every `per_byte`-th input. Put side by side first
        (`decode`) they take four times the traffic of a v5e's memory: of ten layers of E2B and a head of 65,536 tokens 19.8 GB in
        place of 5.0 for one token, as XLA counts it.
        """
        count, outputs = packed.shape
        scales = scale.astype(jnp.float32)[:, None]
        x = x.reshape(*x.shape[:-1], count, self.per_byte)
        total = jnp.zeros((*x.shape[:-2], outputs), jnp.float32)
        for place, stored in enumerate(self._stored(packed)):
            codes = stored.astype(jnp.float32) - self._middle
            w = (codes.reshape(len(scale), -1, outputs) * scales).reshape(count, outputs).astype(x.dtype)
            total += jnp.einsum("...k,kn->...n", x[..., place], w, preferred_element_type=jnp.float32)
        return total.astype(x.dtype)

    @property
    def _middle(self) -> int:
        """What is added to a code so that it is stored without a sign."""
        return 1 << (self.grid.code_bits - 1)

    def _stored(self, packed: jax.Array) -> list[jax.Array]:
        """The numbers at each place of the bytes, lowest bits first; uint8 of packed's shape."""
        bits, mask = self.grid.code_bits, jnp.uint8((1 << self.grid.code_bits) - 1)
        return [(packed >> jnp.uint8(bits * place)) & mask for place in range(self.per_byte)]

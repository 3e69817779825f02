"""The gated feed-forward layer."""

import jax
from flax import nnx

from gemma4_jax.model.linear import Dims, Linear


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation, which Gemma 4 uses throughout its text and vision parts."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """down(gelu(gate x) * up x)."""

    def __init__(self, width: int, ffw: int, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, wide = {"embed": width}, {"ffw": ffw}
        self.gate = Linear(embed, wide, role="ffw", stack=stack, rngs=rngs, dtype=dtype)
        self.up = Linear(embed, wide, role="ffw", stack=stack, rngs=rngs, dtype=dtype)
        self.down = Linear(wide, embed, role="ffw", stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(gelu(self.gate(x_BTD)) * self.up(x_BTD))

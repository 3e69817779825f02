"""The gated feed-forward layer."""

import jax
from flax import nnx

from gemma4_jax.model.linear import Dims, Linear
from gemma4_jax.sharding import constrain


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation, which Gemma 4 uses throughout its text and vision parts."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """down(gelu(gate x) * up x)."""

    def __init__(self, width: int, ffw: int, *, role: str = "ffw", stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, wide = {"embed": width}, {"ffw": ffw}
        self.gate = Linear(embed, wide, role=role, stack=stack, rngs=rngs, dtype=dtype)
        self.up = Linear(embed, wide, role=role, stack=stack, rngs=rngs, dtype=dtype)
        self.down = Linear(wide, embed, role=role, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate, up = (constrain(linear(x_BTD), "batch", "length", "ffw") for linear in (self.gate, self.up))
        return self.down(gelu(gate) * up)

"""The linear map of the towers: inputs and outputs clamped to bounds that stand in the checkpoint.

E2B and E4B were trained with them in both towers; the bounds are state, not parameters. Source: transformers 5.23,
`Gemma4ClippableLinear`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.model.linear import Buffer, Dims, Linear, variable_dims


class ClippedLinear(nnx.Module):
    """clip(clip(x) . w); a plain Linear where `clipped` is False. Adapters and grids belong to `linear`, inside the bounds."""

    def __init__(
        self, inputs: Dims, outputs: Dims, *, clipped: bool, role: str, stack: Dims, rngs: nnx.Rngs, dtype: str
    ):
        self.linear = Linear(inputs, outputs, role=role, stack=stack, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(stack)

        def bound(value: float) -> Buffer | None:
            return Buffer(jnp.full(shape, value, dtype), dims=names) if clipped else None

        self.input_min, self.input_max = bound(-jnp.inf), bound(jnp.inf)
        self.output_min, self.output_max = bound(-jnp.inf), bound(jnp.inf)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _clip(self.linear(_clip(x, self.input_min, self.input_max)), self.output_min, self.output_max)


def _clip(x: jax.Array, low: Buffer | None, high: Buffer | None) -> jax.Array:
    """x between two scalars, in its own dtype; they get no gradient."""
    if low is None or high is None:
        return x
    bounds = (jax.lax.stop_gradient(bound[...].astype(x.dtype)) for bound in (low, high))
    return jax.lax.clamp(next(bounds), x, next(bounds))

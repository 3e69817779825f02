"""RMS normalisation, always in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.model.linear import Dims, variable_dims


def rms_norm(x: jax.Array, eps: float, scale: jax.Array | None = None) -> jax.Array:
    """x * (mean(x^2) + eps)^-1/2, times `scale` over the last axis if given; dtype of x.

    Statistics and scale run in float32: in bfloat16 the variance of outlier channels is lost. The weight multiplies as
    it is, not as 1 + weight as in Gemma 1 to 3.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned scale over the last axis."""

    def __init__(self, dim: Dims, eps: float, *, stack: Dims, dtype: str):
        names, shape = variable_dims(stack, dim)
        self.scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.eps, self.scale[...])

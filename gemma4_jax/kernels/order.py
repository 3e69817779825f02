"""What comes first in a compiled program, where only data can say so."""

import jax
import jax.numpy as jnp

from gemma4_jax.sharding import current_mesh

NEVER = 1e38
"""No hidden state is as large."""


def never(h: jax.Array) -> jax.Array:
    """A scalar that is False and that XLA does not know before hidden states `h` are there."""
    return jnp.abs(h[(0,) * h.ndim].astype(jnp.float32)) > NEVER


def not_before(h: jax.Array, codes: jax.Array) -> jax.Array:
    """uint8 codes as they are, but decoded only when hidden states `h` are there.

    XLA for CPUs takes barriers away before it orders a program's operations, and decodes the weights of all layers first: 10 layers
    of E2B took 2.05 GB of temporaries for one token. On a mesh, where `h` lies cut and not every device has its first number at
    hand, a barrier has to do; it also keeps the codes as codes in a loop over steps.
    """
    if current_mesh() is not None:
        return jax.lax.optimization_barrier((h, codes))[1]
    return codes ^ never(h).astype(codes.dtype)

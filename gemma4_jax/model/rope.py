"""Rotary position embedding: half-split pairs, full or "proportional" (only the first frequencies turn)."""

import jax
import jax.numpy as jnp

from gemma4_jax.config import Rope

Rotation = tuple[jax.Array, jax.Array]
"""(sin, cos), each float32 [B, T, H/2]."""


def rotation(positions: jax.Array, head_dim: int, rope: Rope) -> Rotation:
    """Angles for int32 positions [B, T].

    Frequency i is theta^(-2i/head_dim) for i < int(partial * head_dim // 2), and 0 after that: the exponent has the
    whole head dim even where a quarter rotates. Source: transformers 5.23, `_compute_proportional_rope_parameters`.
    """
    turning = int(rope.partial_rotary_factor * head_dim // 2)
    index = jnp.arange(head_dim // 2, dtype=jnp.float32)
    frequency = jnp.where(index < turning, rope.theta ** (-2.0 * index / head_dim), 0.0)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTNH: jax.Array, turn: Rotation) -> jax.Array:
    """Rotates dim i against dim i + H/2 of every head; float32 inside, dtype of x outside."""
    sin, cos = (t[:, :, None] for t in turn)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)

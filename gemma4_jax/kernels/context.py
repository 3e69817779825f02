"""Keys of a sequence that is cut over devices: a halo, the whole, or the attention of each share put together.

For use inside `shard_map`; `axis` is a mesh axis along which the slots are cut contiguously. The first two are linear maps, so
gradients travel back by themselves: a halo's returns to the device it came from, a whole's is summed and scattered.
"""

import jax
import jax.numpy as jnp


def with_halo(x_BS: jax.Array, axis: str, slots: int, fill: int = 0) -> jax.Array:
    """x [B, S, ...] with the `slots` slots before its own in front of it: [B, slots + S, ...].

    As many devices before this one send as have slots to give. Slots before the first of the sequence hold `fill`.
    """
    devices, local = jax.lax.axis_size(axis), x_BS.shape[1]
    index = jax.lax.axis_index(axis)
    parts = []
    left = slots
    for distance in range(1, devices):
        if left == 0:
            break
        size = min(left, local)
        left -= size
        pairs = [(i, i + distance) for i in range(devices - distance)]
        part = jax.lax.ppermute(x_BS[:, local - size :], axis, pairs)
        # Where nobody sends, zeros arrive.
        parts.insert(0, jnp.where(index >= distance, part, jnp.asarray(fill, x_BS.dtype)) if fill else part)
    if left:
        parts.insert(0, jnp.full((x_BS.shape[0], left, *x_BS.shape[2:]), fill, x_BS.dtype))
    return jnp.concatenate([*parts, x_BS], axis=1)


def whole(x_BS: jax.Array, axis: str) -> jax.Array:
    """x [B, S, ...] of all devices, in order."""
    return jax.lax.all_gather(x_BS, axis, axis=1, tiled=True)


def mirrored_halves(x_BT: jax.Array, axis: str) -> jax.Array:
    """x [B, T, ...] with its second half exchanged for that of the device as far from the other end; its own inverse.

    Of a causal sequence in 2n pieces, device i of n then has pieces 2i and 2n - 1 - 2i, and all devices have equally
    many keys to look at.
    """
    devices, half = jax.lax.axis_size(axis), x_BT.shape[1] // 2
    pairs = [(i, devices - 1 - i) for i in range(devices)]
    return jnp.concatenate([x_BT[:, :half], jax.lax.ppermute(x_BT[:, half:], axis, pairs)], axis=1)


def merged(out_BTNH: jax.Array, lse_BTN: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Attention to all keys from every device's attention to its own, weighed by exp(log-sum-exp) in float32."""
    weight = jnp.exp(lse_BTN - jax.lax.pmax(lse_BTN, axes))[..., None]
    total = jax.lax.psum(weight, axes)
    return (jax.lax.psum(weight * out_BTNH.astype(jnp.float32), axes) / total).astype(out_BTNH.dtype)

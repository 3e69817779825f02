"""Reading and writing blocks of an array inside a loop at the cost of the block, bfloat16 included.

XLA's CPU backend has no bfloat16 slice: it converts the whole array to float32, slices, and converts back; a write in a
loop then costs the whole array every time (bf16 expert matrices of one layer, 8 rows: 15 ms instead of under 1). Slices
of 16-bit integers are native everywhere, so 16-bit floats travel as their bits. Nothing is rounded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Index = int | jax.Array  # known when compiling, or the variable of a loop


def read(x: jax.Array, start: Index, size: int, axis: int = 0) -> jax.Array:
    """x[start : start + size] along `axis`."""
    bits = _bits(x)
    if isinstance(start, int):
        part = jax.lax.slice_in_dim(bits, start, start + size, axis=axis)
    else:
        part = jax.lax.dynamic_slice_in_dim(bits, start, size, axis)
    return value(part, x.dtype)


def buffer(shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Zeros to `write` blocks of `dtype` into; `value` turns the finished buffer into an array of `dtype`."""
    return _bits(jnp.zeros(shape, dtype))


def write(whole: jax.Array, part: jax.Array, start: Index, axis: int = 0) -> jax.Array:
    """`whole`, a `buffer`, with `part` in the place that begins at `start` along `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(whole, _bits(part), start, axis)


def value(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def _bits(x: jax.Array) -> jax.Array:
    is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_half else x

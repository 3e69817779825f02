"""Reading and writing blocks of an array inside a loop at the cost of the block, bfloat16 included.

XLA's CPU backend has no bfloat16 slice: it converts the whole array to float32, slices, and converts back; a write in a
loop then costs the whole array every time (bf16 expert matrices of one layer, 8 rows: 15 ms instead of under 1). Slices
of 16-bit integers are native everywhere, so 16-bit floats travel as their bits. Nothing is rounded.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

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


def moved(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """fn(*arrays) of large arrays, caches, where fn only moves numbers of the first one's dtype, which it returns.

    As bits on CPU, 8-bit floats too, and as they are elsewhere. On a TPU the result lies in memory as its dims are written: XLA
    turns a cache whose slots are written one by one into another order for that, and back for reading, in every step.
    """
    dtype = arrays[0].dtype

    def on_tpu(*arrays: jax.Array) -> jax.Array:
        return _in_order(fn(*arrays))

    if dtype.itemsize > 2 or not jnp.issubdtype(dtype, jnp.floating):
        return jax.lax.platform_dependent(*arrays, tpu=on_tpu, default=fn)
    unsigned = jnp.uint16 if dtype.itemsize == 2 else jnp.uint8

    def on_cpu(*arrays: jax.Array) -> jax.Array:
        bits = (jax.lax.bitcast_convert_type(x, unsigned) if x.dtype == dtype else x for x in arrays)
        return jax.lax.bitcast_convert_type(fn(*bits), dtype)

    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, tpu=on_tpu, default=fn)


def as_it_lies(x: jax.Array) -> jax.Array:
    """x, which XLA for TPUs may not turn into another order of dims for those who use it; nor its gradient.

    Of a slice in a loop it turns the whole stack round: output projections of 31B, of whose heads each of 64 chips holds 4
    numbers, then took 32 times their memory.
    """
    return jax.lax.platform_dependent(x, tpu=_in_order, default=lambda x: x)


def _in_order(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def value(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def _bits(x: jax.Array) -> jax.Array:
    is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_half else x

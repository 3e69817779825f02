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


def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index]. Of a 16-bit table a loop on CPU would make a float32 copy first: 9.4 GB for the per-layer table of E2B."""
    is_half = jnp.issubdtype(table.dtype, jnp.floating) and table.dtype.itemsize == 2
    return _half_rows(table, index) if is_half else table[index]


@jax.custom_vjp
def _half_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    def on_cpu(table: jax.Array, index: jax.Array) -> jax.Array:
        # Bound to the index, or XLA takes the bits of the whole table before the loop.
        table, index = jax.lax.optimization_barrier((table, index))
        return value(_bits(table)[index], table.dtype)

    return jax.lax.platform_dependent(table, index, cpu=on_cpu, default=lambda table, index: table[index])


def _half_rows_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _half_rows(table, index), (table, index)


def _half_rows_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, index = saved
    return jnp.zeros_like(table).at[index].add(gradient), None


_half_rows.defvjp(_half_rows_forward, _half_rows_backward)


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

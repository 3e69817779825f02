"""Rows added up at the places they name: what brings the experts' outputs back to their tokens.

A scatter-add, and that is what CPU and GPU get. XLA's scatter of [65536, 2816] rows takes 24 s to compile for v6e and
runs row after row, so on TPU the rows are grouped by tiles of 128 places and each tile is one product with a matrix of
zeros and weights (6 % of the experts' own FLOPs at D 2816, F 704).
"""

import jax
import jax.numpy as jnp

from gemma4_jax.kernels import grouped_tpu

PLACES_PER_TILE = 128


def sum_rows(
    rows_CD: jax.Array, place_C: jax.Array, weight_C: jax.Array | None, add_to_PD: jax.Array, keep: jax.Array
) -> jax.Array:
    """out[p] = sum of weight_c * rows_c over the rows c with place_c == p: [P, D] in the dtype of `rows_CD`.

    Added to `add_to_PD` if `keep` (a bool scalar) is true; otherwise that only lends its memory. `place_C` is int32; rows placed
    at P or beyond are left out, but must hold numbers (not nan). Weights are rounded to the dtype of the rows. Has no
    derivative of its own.
    """
    weight_C = jnp.ones(place_C.shape, rows_CD.dtype) if weight_C is None else weight_C.astype(rows_CD.dtype)
    operands = rows_CD, place_C, weight_C, add_to_PD, keep
    return jax.lax.platform_dependent(*operands, tpu=_by_tiles, default=_scatter)


def _scatter(
    rows_CD: jax.Array, place_C: jax.Array, weight_C: jax.Array, add_to_PD: jax.Array, keep: jax.Array
) -> jax.Array:
    start = jnp.where(keep, add_to_PD, jnp.zeros_like(add_to_PD))
    return start.at[place_C].add(rows_CD * weight_C[:, None], mode="drop")


def _by_tiles(
    rows_CD: jax.Array,
    place_C: jax.Array,
    weight_C: jax.Array,
    add_to_PD: jax.Array,
    keep: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    (count, width), places = rows_CD.shape, add_to_PD.shape[0]
    tiles = -(-places // PLACES_PER_TILE)
    tile_C = jnp.where(place_C < places, place_C // PLACES_PER_TILE, tiles)
    # One key holds tile and row: XLA compiles a sort of one array in half the time of a sort of pairs.
    if (tiles + 1) * count < 2**31:
        order = jnp.sort(tile_C * count + jax.lax.iota(jnp.int32, count), stable=False) % count
    else:
        order = jnp.argsort(tile_C)
    sizes = jnp.sum(tile_C[:, None] == jax.lax.iota(jnp.int32, tiles)[None, :], axis=0, dtype=jnp.int32)
    place, weight = place_C[order] % PLACES_PER_TILE, weight_C[order]
    is_place = place[:, None] == jax.lax.iota(jnp.int32, PLACES_PER_TILE)[None, :]
    spread = jnp.where(is_place, weight[:, None], jnp.zeros_like(weight)[:, None])
    add_to = jnp.pad(add_to_PD, ((0, tiles * PLACES_PER_TILE - places), (0, 0)))
    out = grouped_tpu.outer(
        spread,
        rows_CD[order],
        sizes,
        add_to.reshape(tiles, PLACES_PER_TILE, width),
        keep,
        exact=rows_CD.dtype == jnp.float32,
        interpret=interpret,
    )
    return out.reshape(-1, width)[:places]

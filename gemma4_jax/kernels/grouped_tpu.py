"""The grouped products on a TPU, as Pallas kernels: rows sorted by expert times the expert's matrix, and its gradient.

A tile of rows is visited once for every expert that has rows in it. The whole contracted width and, where they fit, all
columns of an expert's matrix lie in VMEM at once, so each matrix is read once per call however many tiles its rows
take. Rows past the sum of the sizes cost no product.

Why not what others use, compiled for one v6e chip (jax 0.10.2, libtpu 0.0.42; 65,536 rows, 16 experts of [2816, 1408],
bf16): `jax.lax.ragged_dot` is a kernel with the same tiles (256, 2816, 1408) forward, but XLA computes the gradient of
its matrices densely (every row for every expert: 8.8 TFLOP, where both gradients need 1.04), copies them transposed,
and keeps 738 MB of float32. megablox spends 3 to 7 s of compile time per call on its list of visits, and its kernel
cannot ask for more than the 16 MiB of VMEM that v5p gives by default, so the matrix is read in pieces for every tile.

In a compiled program the calls are `%grouped_matmul` [M, N] and `%grouped_outer` [E, K, N], target `tpu_custom_call`; the
shapes of the matrix operands, [M, K] and [E, K, N] or [M, K] and [M, N], give 2 M K N FLOPs if every row is real.
"""

import functools

import jax
import jax.numpy as jnp

MAX_TILE_ROWS = 512
"""A multiple of every chip's matrix unit; larger tiles are shared by more experts and computed once for each."""

MIN_TILE_ROWS = 128

VMEM_BYTES = 48 * 2**20
"""What a kernel may use; the largest takes 31 MiB. v5p and tpu7x have 64 MiB, v5e and v6e 128 MiB
(jax/_src/pallas/mosaic/tpu_info.py). v4 has 16 MiB: the kernels at the size of 26B-A4B do not compile for it."""

MATRIX_BYTES = 24 * 2**20
"""Of it, for the two copies of a matrix that a pipeline holds, or for a gradient's sum and its copies."""


def matmul(
    lhs_MK: jax.Array, rhs: jax.Array, sizes_E: jax.Array, *, transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Row m times the matrix of its expert: [M, N] in lhs's dtype, zeros in rows past the sum of the sizes.

    rhs is [E, K, N], or [E, N, K] if `transposed`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, k), experts = lhs_MK.shape, rhs.shape[0]
    n = rhs.shape[1] if transposed else rhs.shape[2]
    m = tile_rows(rows, experts)
    lhs = _padded(lhs_MK, m)
    columns = _columns(n, 2 * k * rhs.dtype.itemsize)
    schedule, visited = visits(sizes_E, lhs.shape[0], m, tail=True)

    def kernel(group_V, tile_V, begin_V, end_V, lhs_ref, rhs_ref, out_ref):
        v = pl.program_id(1)
        opens = (v == 0) | (tile_V[v] != tile_V[jnp.maximum(v - 1, 0)])

        @pl.when(group_V[v] < experts)
        def _():
            contracted = (((1,), (1 if transposed else 0,)), ((), ()))
            product = jax.lax.dot_general(
                lhs_ref[...], rhs_ref[...], contracted, preferred_element_type=jnp.float32
            ).astype(out_ref.dtype)
            row = jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
            mine = (row >= begin_V[v]) & (row < end_V[v])

            @pl.when(opens)
            def _():
                out_ref[...] = jnp.where(mine, product, jnp.zeros_like(product))

            @pl.when(~opens)
            def _():
                out_ref[...] = jnp.where(mine, product, out_ref[...])

        @pl.when((group_V[v] >= experts) & opens)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

    def rhs_block(j, v, group_V, *_):
        e = jnp.minimum(group_V[v], experts - 1)
        return (e, j, 0) if transposed else (e, 0, j)

    out = pl.pallas_call(
        kernel,
        name="grouped_matmul",
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], n), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-n // columns), visited),
            in_specs=[
                pl.BlockSpec((m, k), lambda j, v, group_V, tile_V, *_: (tile_V[v], 0)),
                pl.BlockSpec((None, columns, k) if transposed else (None, k, columns), rhs_block),
            ],
            out_specs=pl.BlockSpec((m, columns), lambda j, v, group_V, tile_V, *_: (tile_V[v], j)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(pl, rows, k, n, lhs.nbytes + rhs.nbytes + rows * n * lhs.dtype.itemsize),
        interpret=interpret,
    )(*schedule, lhs, rhs)
    return out[:rows]


def outer(
    lhs_MK: jax.Array,
    rhs_MN: jax.Array,
    sizes_E: jax.Array,
    add_to_EKN: jax.Array,
    keep: jax.Array,
    *,
    exact: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """For each expert the sum over its rows of lhs_m rhs_m^T: [E, K, N] in lhs's dtype, summed in float32.

    Rows past the sum of the sizes must hold numbers (not nan) in `lhs_MK`. If `keep` (a bool scalar) is true the sums
    are added to `add_to_EKN`, whose memory the result takes; if it is false what is there is neither read nor kept.
    `exact` multiplies float32 as float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, k), n, experts = lhs_MK.shape, rhs_MN.shape[1], sizes_E.shape[0]
    m = tile_rows(rows, experts)
    lhs, rhs = _padded(lhs_MK, m), _padded(rhs_MN, m)
    inner, columns = _gradient_block(k, n, lhs.dtype.itemsize)
    schedule, visited = visits(sizes_E, lhs.shape[0], m, tail=False)

    def add_to_block(i, j, v, group_V, tile_V, begin_V, end_V, keep_1):
        # A block that stays the same is fetched once.
        return group_V[v] * keep_1[0], i * keep_1[0], j * keep_1[0]

    return pl.pallas_call(
        functools.partial(_outer_kernel, exact),
        name="grouped_outer",
        out_shape=jax.ShapeDtypeStruct((experts, k, n), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(-(-k // inner), -(-n // columns), visited),
            in_specs=[
                pl.BlockSpec((m, inner), lambda i, j, v, group_V, tile_V, *_: (tile_V[v], i)),
                pl.BlockSpec((m, columns), lambda i, j, v, group_V, tile_V, *_: (tile_V[v], j)),
                pl.BlockSpec((None, inner, columns), add_to_block),
            ],
            out_specs=pl.BlockSpec((None, inner, columns), lambda i, j, v, group_V, *_: (group_V[v], i, j)),
            scratch_shapes=[pltpu.VMEM((inner, columns), jnp.float32)],
        ),
        input_output_aliases={7: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(pl, rows, k, n, lhs.nbytes + rhs.nbytes + experts * k * n * lhs.dtype.itemsize),
        interpret=interpret,
    )(*schedule, keep.astype(jnp.int32).reshape(1), lhs, rhs, add_to_EKN)


def _outer_kernel(
    exact: bool, group_V, _tile_V, begin_V, end_V, keep_1, lhs_ref, rhs_ref, add_to_ref, out_ref, sum_ref
) -> None:
    """One visit of `outer`: adds a tile's products to its expert's sum, and writes the sum at the expert's last visit."""
    from jax.experimental import pallas as pl

    v, last = pl.program_id(2), pl.num_programs(2) - 1
    group = group_V[v]

    @pl.when((v == 0) | (group_V[jnp.maximum(v - 1, 0)] != group))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(end_V[v] > begin_V[v])
    def _():
        row = jax.lax.broadcasted_iota(jnp.int32, rhs_ref.shape, 0)
        mine = (row >= begin_V[v]) & (row < end_V[v])
        sum_ref[...] += jax.lax.dot_general(
            lhs_ref[...],
            jnp.where(mine, rhs_ref[...], jnp.zeros_like(rhs_ref)),
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    closes = (v == last) | (group_V[jnp.minimum(v + 1, last)] != group)

    @pl.when(closes & (keep_1[0] == 0))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(closes & (keep_1[0] != 0))
    def _():
        out_ref[...] = (sum_ref[...] + add_to_ref[...].astype(jnp.float32)).astype(out_ref.dtype)


def tile_rows(rows: int, experts: int) -> int:
    """Rows per tile: an eighth of an expert's mean share, as a power of two between the bounds above.

    A tile on the border of two experts is computed for both: about `experts` tiles more than the rows need.
    """
    share = max(1, rows // max(1, experts) // 8)
    return max(MIN_TILE_ROWS, min(MAX_TILE_ROWS, 1 << (share.bit_length() - 1)))


def _columns(n: int, bytes_each: int) -> int:
    """Columns per block: all, or the fewest equal parts of whole lanes that fit."""
    parts = -(-n * bytes_each // MATRIX_BYTES)
    return n if parts == 1 else -(-n // (128 * parts)) * 128


def _gradient_block(k: int, n: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of an expert's gradient per block: its float32 sum, and two copies each of what is read and written."""
    each = 4 + 4 * itemsize
    return (k, _columns(n, k * each)) if n > k else (_columns(k, n * each), n)


def visits(sizes_E: jax.Array, rows: int, m: int, *, tail: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(expert, tile, first row, end row within the tile) of every visit, int32 [V] each, and how many are real.

    In ascending order of experts and tiles. With `tail` the rows past the last expert's belong to one more group and
    empty experts are skipped; without it they are visited once, with no rows.
    """
    sizes = sizes_E.astype(jnp.int32)
    if tail:
        sizes = jnp.concatenate([sizes, rows - jnp.sum(sizes, dtype=jnp.int32, keepdims=True)])
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    begins = ends - sizes
    first = jnp.minimum(begins // m, rows // m - 1)
    count = jnp.where(sizes > 0, (ends - 1) // m - first + 1, 0 if tail else 1)
    stop = jnp.cumsum(count, dtype=jnp.int32)

    v = jax.lax.iota(jnp.int32, rows // m + sizes.shape[0])
    group = jnp.sum(stop[None, :] <= v[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    is_group = group[:, None] == jax.lax.iota(jnp.int32, sizes.shape[0])[None, :]

    def of_group(x):
        return jnp.sum(jnp.where(is_group, x[None, :], 0), axis=1, dtype=jnp.int32)

    tile = jnp.clip(v + of_group(first - stop + count), 0, rows // m - 1)
    return (group, tile, of_group(begins) - tile * m, of_group(ends) - tile * m), stop[-1]


def _padded(x: jax.Array, m: int) -> jax.Array:
    return x if x.shape[0] % m == 0 else jnp.pad(x, ((0, -x.shape[0] % m), (0, 0)))


def _cost(pl, rows: int, k: int, n: int, size: int):
    return pl.CostEstimate(flops=2 * rows * k * n, bytes_accessed=size, transcendentals=0)

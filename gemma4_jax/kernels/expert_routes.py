"""What one device does in `experts`: its rows through its experts, and the ways tokens come to experts elsewhere.

R = M * k rows, one per (token, choice): slot t * k + j. Sorted by expert, each device's experts' rows are neighbours. A
block is C rows sorted by expert, of which the first `sum(sizes)` are real. Device s of S holds the experts from s * E/S.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.kernels.grouped_matmul import grouped_gradients, grouped_matmul
from gemma4_jax.kernels.slices import read
from gemma4_jax.kernels.sum_rows import sum_rows
from gemma4_jax.sharding import AXES

AXIS = "expert"

ROOM = 1.25
"""Rows in a block per row of an even share. Loads are uneven, but that of a device, the sum of several experts', less so."""

SMALLEST_LIMIT, ROWS_PER_EXPERT = 8192, 512
"""A block has at most the first many rows, or the second for each expert of the device if that is more.

A block of 26B-A4B with its inner activations and their gradients takes 30 kB a row: 8192 rows are 0.25 GiB. But each block
reads all weights, and 512 rows do 512 FLOPs a byte with them, about what v6e can (560). With blocks of 8192 for 32 experts that
was half of the step's HBM traffic.
"""

SMALLEST_BLOCK = 1024
"""Rows; if the worst case is no more than this, there is one block and no loop."""

Gate = Callable[[jax.Array], jax.Array]
"""[rows, 2F] -> [rows, F]: the activation of the first half times the second."""

Gradients = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Of x [M, D], weights [M, k], and both matrices."""


class Tokens(NamedTuple):
    """One device's tokens: x [M, D], weights float32 and index int32 [M, k]."""

    x: jax.Array
    weights: jax.Array
    index: jax.Array


class Matrices(NamedTuple):
    """One device's experts: [E, D, 2F] and [E, F, D]."""

    w_in: jax.Array
    w_out: jax.Array
    gate: Gate


# The experts on a block of rows.


def block_forward(rows_CD: jax.Array, sizes_E: jax.Array, matrices: Matrices) -> tuple[jax.Array, jax.Array]:
    """The experts' outputs [C, D], and the inner activations [C, 2F] that the derivative needs."""
    inner = grouped_matmul(rows_CD, matrices.w_in, sizes_E, inputs_minor=True)
    return grouped_matmul(matrices.gate(inner), matrices.w_out, sizes_E), inner


def block_backward(
    rows_CD: jax.Array,
    d_out_CD: jax.Array,
    weight_C: jax.Array,
    inner_CF: jax.Array | None,
    sizes_E: jax.Array,
    matrices: Matrices,
    add_to: tuple[jax.Array | None, jax.Array | None] = (None, None),
    keep: jax.Array | None = None,
) -> Gradients:
    """Gradients of rows [C, D], their weights float32 [C], and both matrices; `d_out_CD` is that of the token's sum.

    The weight's is <gate, d_out . w_out^T>, so the outputs themselves are not needed. Those of the matrices are added
    to `add_to` where `keep` is true.
    """
    if inner_CF is None:
        inner_CF = grouped_matmul(rows_CD, matrices.w_in, sizes_E, inputs_minor=True)
    hidden, gate_pullback = jax.vjp(matrices.gate, inner_CF)
    weight = weight_C.astype(hidden.dtype)[:, None]
    d_hidden, d_w_out = grouped_gradients(hidden * weight, matrices.w_out, sizes_E, d_out_CD, add_to[1], keep)
    d_weight = jnp.sum(hidden.astype(jnp.float32) * d_hidden.astype(jnp.float32), axis=-1)
    (d_inner,) = gate_pullback(d_hidden * weight)
    d_rows, d_w_in = grouped_gradients(rows_CD, matrices.w_in, sizes_E, d_inner, add_to[0], keep, inputs_minor=True)
    return d_rows, d_weight, d_w_in, d_w_out


# Every expert is here.


def whole_forward(tokens: Tokens, matrices: Matrices) -> tuple[jax.Array, jax.Array]:
    """[M, D] and the inner activations [R, 2F], sorted by expert."""
    order, place, counts = sort_by_expert(tokens.index, matrices.w_in.shape[0])
    out, inner = block_forward(tokens.x[order // tokens.index.shape[1]], counts, matrices)
    return _weighted_sum(out[place], tokens.weights), inner


FEW = 16
"""Rows that are worked through one by one on CPU: those of one token of 26B-A4B, or two."""

MANY = 16
"""Tokens that all go through all experts on CPU, if they choose most of them anyway."""


def small_forward(tokens: Tokens, matrices: Matrices) -> Callable[[Tokens, Matrices], jax.Array] | None:
    """How a few tokens pass their experts on CPU, without a derivative; None: as many do."""
    count, top_k = tokens.index.shape
    if count * top_k <= FEW:
        return few_forward
    return every_forward if count <= MANY and count * top_k >= matrices.w_in.shape[0] else None


def every_forward(tokens: Tokens, matrices: Matrices) -> jax.Array:
    """[M, D] where most experts are chosen by somebody: all experts on all tokens, what was not chosen weighing nothing.

    The matrices are read where they lie, by products that use all cores; a loop over experts copies each one first.
    """
    experts = matrices.w_in.shape[0]
    chosen_MkE = tokens.index[..., None] == jax.lax.iota(jnp.int32, experts)[None, None]
    weight_ME = jnp.sum(jnp.where(chosen_MkE, tokens.weights[..., None], 0.0), axis=1)
    x_EMD = jnp.broadcast_to(tokens.x[None], (experts, *tokens.x.shape))
    inner = jnp.einsum("EMD,EDF->EMF", x_EMD, matrices.w_in, preferred_element_type=jnp.float32)
    hidden = matrices.gate(inner) * weight_ME.T[..., None]
    wide = hidden.swapaxes(0, 1).reshape(tokens.x.shape[0], -1).astype(tokens.x.dtype)
    out = jnp.matmul(wide, matrices.w_out.reshape(-1, tokens.x.shape[1]), preferred_element_type=jnp.float32)
    return out.astype(tokens.x.dtype)


def few_forward(tokens: Tokens, matrices: Matrices) -> jax.Array:
    """[M, D] of a few rows: each reads its own expert's matrices and nothing is sorted. Without a derivative.

    The rows do not wait for each other, so the cores of a CPU share them, which the loop over experts does not allow: a decoding
    step of 12 layers with 32 experts, 8 of them chosen, spends two fifths of its time in that loop.
    """
    out = [jnp.zeros(tokens.x.shape[1:], jnp.float32)] * tokens.x.shape[0]
    for m in range(tokens.x.shape[0]):
        for j in range(tokens.index.shape[1]):
            w_in, w_out = (
                read(w, tokens.index[m, j], 1)[0].astype(jnp.float32) for w in (matrices.w_in, matrices.w_out)
            )
            hidden = matrices.gate(tokens.x[m : m + 1].astype(jnp.float32) @ w_in)
            out[m] = out[m] + tokens.weights[m, j] * (hidden @ w_out)[0]
    return jnp.stack(out).astype(tokens.x.dtype)


def whole_backward(tokens: Tokens, matrices: Matrices, inner: jax.Array, d_out_MD: jax.Array) -> Gradients:
    order, place, counts = sort_by_expert(tokens.index, matrices.w_in.shape[0])
    token, weight = order // tokens.index.shape[1], tokens.weights.reshape(-1)[order]
    d_rows, d_weight, d_in, d_w_out = block_backward(tokens.x[token], d_out_MD[token], weight, inner, counts, matrices)
    return jnp.sum(d_rows[place], axis=1), d_weight[place], d_in, d_w_out


# The tokens of all come to every device.


class Gathered(NamedTuple):
    """The tokens of S devices, and where the rows of this one's experts are among their slots.

    x [S * M, D]; weights [S * R]; slots [S * R], each device's own sorted by expert; sizes [E, S] rows of expert e from device
    s; sources [E, S] the first of them in `slots`.
    """

    x: jax.Array
    weights: jax.Array
    slots: jax.Array
    sizes: jax.Array
    sources: jax.Array

    @property
    def top_k(self) -> int:
        return self.slots.shape[0] // self.x.shape[0]

    def block(self, number: jax.Array | int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Slots and which are real, both [rows], weights (0 if not real), and sizes [E] of one block of rows."""
        r = number * rows + jax.lax.iota(jnp.int32, rows)
        real = r < jnp.sum(self.sizes, dtype=jnp.int32)
        source = jnp.where(real, lay_end_to_end(r, self.sizes.reshape(-1), self.sources.reshape(-1)), 0)
        slot = self.slots[source]
        per_expert = jnp.sum(self.sizes, axis=1, dtype=jnp.int32)
        ends = jnp.cumsum(per_expert, dtype=jnp.int32) - number * rows
        sizes = jnp.clip(ends, 0, rows) - jnp.clip(ends - per_expert, 0, rows)
        return slot, real, jnp.where(real, self.weights[slot], 0.0), sizes


def gather(tokens: Tokens, experts: int, ranks: int, replicated: bool) -> Gathered:
    """All-gather over the axis, or if `replicated` nothing: the tokens are the same on all of it."""
    order, _, counts = sort_by_expert(tokens.index, experts * ranks)
    weights, sources = tokens.weights.reshape(-1), 1 if replicated else ranks
    x = tokens.x
    order, counts = order[None], counts[None]
    if not replicated:
        x, weights, order, counts = (_all_gather(a) for a in (x, weights, order, counts))
    slots = jnp.arange(sources, dtype=jnp.int32)[:, None] * order.shape[1]
    starts = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts + slots
    here = jax.lax.axis_index(AXIS) * experts
    sizes, starts = (jax.lax.dynamic_slice_in_dim(a, here, experts, 1).T for a in (counts, starts))
    return Gathered(x, weights, (order + slots).reshape(-1), sizes, starts)


def gather_forward(tokens: Tokens, matrices: Matrices, ranks: int, replicated: bool) -> jax.Array:
    all_of = gather(tokens, matrices.w_in.shape[0], ranks, replicated)
    places, rows, blocks = all_of.x.shape[0], *_blocks(all_of, ranks, matrices)

    def step(number, out):
        slot, real, weight, sizes = all_of.block(number, rows)
        token = slot // all_of.top_k
        done, _ = block_forward(all_of.x[token], sizes, matrices)
        return sum_rows(done, jnp.where(real, token, places), weight, out, number > 0)

    out = jax.lax.fori_loop(0, blocks, step, _empty_like(all_of.x, all_of.x))
    return _sum_and_split(out, replicated)


def gather_backward(tokens: Tokens, matrices: Matrices, ranks: int, replicated: bool, d_out_MD: jax.Array) -> Gradients:
    all_of = gather(tokens, matrices.w_in.shape[0], ranks, replicated)
    d_out = d_out_MD if replicated else _all_gather(d_out_MD)
    places, k, rows, blocks = all_of.x.shape[0], all_of.top_k, *_blocks(all_of, ranks, matrices)

    def step(number, sums):
        d_x, d_weights, *d_matrices = sums
        slot, real, weight, sizes = all_of.block(number, rows)
        token, place, keep = slot // k, jnp.where(real, slot // k, places), number > 0
        d_rows, d_weight, *d_matrices = block_backward(
            all_of.x[token], d_out[token], weight, None, sizes, matrices, tuple(d_matrices), keep
        )
        is_choice = (slot % k)[:, None] == jax.lax.iota(jnp.int32, k)[None, :]
        d_weights = sum_rows(jnp.where(is_choice, d_weight[:, None], 0.0), place, None, d_weights, keep)
        return sum_rows(d_rows, place, None, d_x, keep), d_weights, *d_matrices

    like = all_of.x, jax.ShapeDtypeStruct((places, k), jnp.float32), *matrices[:2]
    d_x, d_weights, d_in, d_w_out = jax.lax.fori_loop(0, blocks, step, tuple(_empty_like(x, d_out) for x in like))
    return _sum_and_split(d_x, replicated), _sum_and_split(d_weights, replicated), d_in, d_w_out


def _blocks(all_of: Gathered, ranks: int, matrices: Matrices) -> tuple[int, jax.Array | int]:
    """Rows per block and number of blocks."""
    k, experts = all_of.top_k, matrices.w_in.shape[0]
    most = all_of.x.shape[0] * min(k, experts)
    rows = block_rows(all_of.slots.shape[0] // ranks, most, largest_block(experts))
    if rows == most:
        return rows, 1
    # At least one: the first block is what writes the zeros of a device without rows.
    return rows, jnp.maximum(1, -(-jnp.sum(all_of.sizes, dtype=jnp.int32) // rows))


# Rows go to their expert's device and come back.


class Exchange(NamedTuple):
    """Rows on their way; every pair of the S devices exchanges at most `rows` rows in a round.

    slots [R] sorted by expert; begins, ends [S] those for device d; places [M, k] each slot's place among them; sent [S, E]
    how many rows device s has in all for expert e of this device.
    """

    slots: jax.Array
    places: jax.Array
    begins: jax.Array
    ends: jax.Array
    sent: jax.Array
    rows: int
    rounds: jax.Array | int

    def outgoing(self, number: jax.Array | int) -> jax.Array:
        """The slots [S * rows] to send, device after device; rows past a device's last repeat some slot."""
        i = self.begins[:, None] + number * self.rows + jax.lax.iota(jnp.int32, self.rows)[None, :]
        return self.slots[jnp.minimum(i, self.slots.shape[0] - 1).reshape(-1)]

    def returned(self, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Where each slot's row comes back in this round, and whether it does: both [M, k]."""
        device = jnp.sum(self.ends[None, None, :] <= self.places[:, :, None], axis=-1, dtype=jnp.int32)
        offset = self.places - self.begins[device] - number * self.rows
        here = (offset >= 0) & (offset < self.rows)
        return jnp.where(here, device * self.rows + offset, 0), here

    def arrived(self, number: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows received, as (sorted by expert: places among the received, the reverse, sizes [E])."""
        ends = jnp.cumsum(self.sent, axis=1, dtype=jnp.int32) - number * self.rows
        begins = jnp.clip(ends - self.sent, 0, self.rows)
        sizes = jnp.clip(ends, 0, self.rows) - begins
        count, (devices, experts) = self.sent.shape[0] * self.rows, self.sent.shape
        chunk = jax.lax.iota(jnp.int32, devices)[:, None] * self.rows
        r = jax.lax.iota(jnp.int32, count)
        by_expert = lay_end_to_end(r, sizes.T.reshape(-1), (begins + chunk).T.reshape(-1))
        # Back: each device's chunk is laid end to end from its experts' segments and a rest that no expert had.
        first = (jnp.cumsum(sizes.T.reshape(-1), dtype=jnp.int32) - sizes.T.reshape(-1)).reshape(experts, devices).T
        rest = self.rows - jnp.sum(sizes, axis=1, dtype=jnp.int32, keepdims=True)
        back = lay_end_to_end(
            r,
            jnp.concatenate([sizes, rest], axis=1).reshape(-1),
            jnp.concatenate([first, jnp.zeros_like(rest)], axis=1).reshape(-1),
        )
        return jnp.clip(by_expert, 0, count - 1), jnp.clip(back, 0, count - 1), jnp.sum(sizes, axis=0, dtype=jnp.int32)


def exchange(tokens: Tokens, experts: int, ranks: int) -> Exchange:
    (count, k), here = tokens.index.shape, jax.lax.axis_index(AXIS) * experts
    order, places, counts = sort_by_expert(tokens.index, experts * ranks)
    per_device = jnp.sum(counts.reshape(ranks, experts), axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(per_device, dtype=jnp.int32)
    sent = jax.lax.dynamic_slice_in_dim(_all_gather(counts[None]), here, experts, 1)
    most = count * min(k, experts)
    rows = block_rows(count * k // ranks, most, largest_block(experts) // ranks)
    # Every device takes part in every exchange, so all agree on their number; at least one, as it writes the zeros.
    rounds = 1 if rows == most else jnp.maximum(1, jax.lax.pmax(jnp.max(-(-per_device // rows)), AXES))
    return Exchange(order, places, ends - per_device, ends, sent, rows, rounds)


def exchange_forward(tokens: Tokens, matrices: Matrices, ranks: int) -> jax.Array:
    plan = exchange(tokens, matrices.w_in.shape[0], ranks)

    def step(number, out):
        received = _all_to_all(tokens.x[plan.outgoing(number) // tokens.index.shape[1]])
        by_expert, back, sizes = plan.arrived(number)
        done, _ = block_forward(received[by_expert], sizes, matrices)
        place, here = plan.returned(number)
        return out + _weighted_sum(_all_to_all(done[back])[place], jnp.where(here, tokens.weights, 0.0))

    return jax.lax.fori_loop(0, plan.rounds, step, jnp.zeros_like(tokens.x))


def exchange_backward(tokens: Tokens, matrices: Matrices, ranks: int, d_out_MD: jax.Array) -> Gradients:
    plan = exchange(tokens, matrices.w_in.shape[0], ranks)
    k = tokens.index.shape[1]

    def step(number, sums):
        d_x, d_weights, *d_matrices = sums
        slot = plan.outgoing(number)
        sent = tokens.x[slot // k], d_out_MD[slot // k], tokens.weights.reshape(-1)[slot]
        by_expert, back, sizes = plan.arrived(number)
        rows, d_out, weight = (_all_to_all(a)[by_expert] for a in sent)
        d_rows, d_weight, *d_matrices = block_backward(
            rows, d_out, weight, None, sizes, matrices, tuple(d_matrices), number > 0
        )
        place, here = plan.returned(number)
        d_rows, d_weight = (_all_to_all(a[back])[place] for a in (d_rows, d_weight))
        d_x = d_x + jnp.sum(jnp.where(here[:, :, None], d_rows, jnp.zeros_like(d_rows)), axis=1)
        return d_x, d_weights + jnp.where(here, d_weight, 0.0), *d_matrices

    zeros = jnp.zeros_like(tokens.x), jnp.zeros_like(tokens.weights)
    return jax.lax.fori_loop(0, plan.rounds, step, (*zeros, *(_empty_like(x, tokens.x) for x in matrices[:2])))


# Shared by the routes.


def sort_by_expert(index_Mk: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slots in ascending order of expert (then of slot) [R], each slot's place in it [M, k], rows per expert [E]."""
    expert = jax.lax.iota(jnp.int32, experts)
    chosen = index_Mk[:, :, None] == expert[None, None, :]
    member = jnp.sum(chosen, axis=1, dtype=jnp.int32)
    before, counts = _exclusive_sums(member)
    first = before + (jnp.cumsum(counts, dtype=jnp.int32) - counts)[None, :]
    place = jnp.sum(jnp.where(chosen, first[:, None, :], 0), axis=-1, dtype=jnp.int32)
    slot = jax.lax.iota(jnp.int32, index_Mk.size)
    # XLA compiles a sort of one array in half the time of a sort of pairs, so one key holds expert and slot.
    if experts * index_Mk.size < 2**31:
        order = jnp.sort(index_Mk.reshape(-1) * index_Mk.size + slot, stable=False) % index_Mk.size
    else:
        order = jnp.argsort(index_Mk.reshape(-1), stable=True).astype(jnp.int32)
    return order, place, counts


def _exclusive_sums(x_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows before each, and over all, of zeros and ones int32.

    XLA takes 3 s to compile a running sum of [8192, 128] for a TPU, so a product with a triangle sums within parts of 128
    rows; float32 holds these sums exactly.
    """
    rows, part = x_ME.shape[0], 128
    if rows <= part:
        ends = jnp.cumsum(x_ME, axis=0, dtype=jnp.int32)
        return ends - x_ME, ends[-1]
    parts = jnp.pad(x_ME, ((0, -rows % part), (0, 0))).reshape(-1, part, x_ME.shape[1])
    before = jnp.tril(jnp.ones((part, part), jnp.float32), -1)
    within = jnp.einsum("ij,pjE->piE", before, parts.astype(jnp.float32)).astype(jnp.int32)
    totals = jnp.sum(parts, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(totals, axis=0, dtype=jnp.int32)
    return (within + (ends - totals)[:, None]).reshape(-1, x_ME.shape[1])[:rows], ends[-1]


def lay_end_to_end(r: jax.Array, sizes_S: jax.Array, sources_S: jax.Array) -> jax.Array:
    """The source of element r when segments that lie at `sources_S` are laid end to end; past the last, any number."""
    ends = jnp.cumsum(sizes_S, dtype=jnp.int32)
    shift = sources_S - (ends - sizes_S)
    passed = ends[None, :-1] <= r[:, None]
    return r + shift[0] + jnp.sum(jnp.where(passed, jnp.diff(shift)[None, :], 0), axis=1, dtype=jnp.int32)


def _weighted_sum(rows_MkD: jax.Array, weights_Mk: jax.Array) -> jax.Array:
    return jnp.sum(rows_MkD * weights_Mk.astype(rows_MkD.dtype)[:, :, None], axis=1)


def largest_block(experts: int) -> int:
    """Most rows in a block of a device that holds so many experts."""
    return max(SMALLEST_LIMIT, ROWS_PER_EXPERT * experts)


def block_rows(even_share: int, most: int, largest: int) -> int:
    """Rows per block: an even share and some room, or an even part of that, in whole tiles of 128."""
    rows = int(even_share * ROOM)
    parts = max(1, -(-rows // largest))  # a token of decoding has less than one row for each device
    return min(most, max(min(SMALLEST_BLOCK, largest), -(-rows // (parts * 128)) * 128))


def _empty_like(x: jax.Array | jax.ShapeDtypeStruct, after: jax.Array) -> jax.Array:
    """Memory to write to; zeros would be written, read and added for nothing (v6e: as long as half the block).

    Made when `after` is there: XLA would take it out of the loop over layers, keep it, and copy it in every layer.
    """
    return jax.lax.optimization_barrier((jax.lax.empty(x.shape, x.dtype), after))[0]


def _all_gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS, axis=0, tiled=True)


def _all_to_all(x: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def _sum_and_split(x: jax.Array, replicated: bool) -> jax.Array:
    if replicated:
        return jax.lax.psum(x, AXIS)
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)

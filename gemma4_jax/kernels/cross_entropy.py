"""The loss over 262,144 classes without ever holding [tokens, classes]: a chunk of rows at a time, gradients included.

loss = sum over rows of weight * ((1 - a) * CE + a * KL), with logits = softcap * tanh(h . E^T / softcap) in float32,
or h . E^T where softcap is None.
Rows of weight 0 are sorted to the end and never multiplied. When the loss is differentiated, the forward pass computes
the gradients chunk by chunk while the logits are there (three products per chunk, nothing recomputed) and the backward
pass only scales them. Of a table that is not differentiated by (frozen, beside adapters) no gradient is made: two products.
Soft cap: Gemma 2 report (arXiv:2408.00118), section 2.

On a mesh the table stays cut by rows. The n devices that hold it together gather each other's chunk of hidden states,
each multiplies them all by its own rows of the table, maxima and sums over the vocabulary are made across devices, and
the gradient of the hidden states goes home by reduce-scatter in their dtype: 2 * (n - 1) vectors sent per token. The next
chunk is gathered while one is multiplied.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from gemma4_jax.kernels.slices import buffer, read, value, write
from gemma4_jax.kernels.vocabulary import Cut, cut_of, gather, island, narrowed, scatter_total, total

# One float32 chunk of logits takes this much; about three such arrays live at a time. A chunk also costs one pass over
# the float32 gradient of the table, so there is a least number of rows. 512 rows of a vocabulary of 32,768 (on CPU 256
# rows were 5 to 16 % faster than 1,024, and 64 rows 15 to 30 % slower than 256); 128 rows (128 MiB) of Gemma's 262,144.
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK = 128

# On a mesh a device has only its part of the vocabulary, so a chunk has more rows, of all devices together. From 2,048
# rows on the pass over the table's gradient takes no longer than the product that feeds it (8 bytes against 2 * rows FLOPs:
# 660 rows on v5p, 1,000 on v5e, 1,200 on H100 and tpu7x, 2,240 on v6e). Up to 128 MiB of logits: 2,048 rows on 16 devices
# or more, 1,024 on 8.
MESH_CHUNK_BYTES = 128 * 2**20
MESH_CHUNK = 2048


LEAST_REST = 1e-6
"""Least probability of all tokens that are not among the likeliest: below it float32 sums of the others are noise."""


class Likeliest(NamedTuple):
    """What is kept of a teacher's answer to a row: its K most likely tokens, int32 ids [..., K], and float32 log_p [..., K + 1],
    their log-probabilities and that of all others together. NumPy arrays until a batch is placed.
    """

    ids: Any
    log_p: Any

    def with_dims(self, change: Callable[[Any, tuple[str | None, ...]], Any]) -> "Likeliest":
        """`change(array, dims)` of both, as a batch holds them: [B, T, K]."""
        return Likeliest(*(change(x, ("batch", "length", None)) for x in self))


Teacher = tuple[jax.Array, jax.Array] | Likeliest | None
Sums = dict[str, jax.Array]


class Options(NamedTuple):
    softcap: float | None
    chunk: int
    distill_weight: float
    reverse_kl: bool
    cut: Cut


class Rows(NamedTuple):
    """Rows in the order they are processed, padded to whole chunks; `used` of them have a weight.

    All rows: hidden states of this device [M, D], targets and weights of all devices that share the table [devices, M].
    A chunk: those of all devices, [M, D] and [M]. What the teacher says of each row: its hidden state, or a `Likeliest`.
    """

    order: jax.Array
    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    teacher: tuple[jax.Array, ...]
    used: jax.Array


def token_losses(
    hidden: jax.Array,
    table_VD: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None,
    chunk: int | None = None,
    teacher: Teacher = None,
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the losses, and {"ce_sum", "kl_sum", "correct_sum"}: float32 scalars.

    hidden [..., D] with [M] or [B, T] rows, table_VD: one floating dtype; the products are summed in float32. targets
    [...]: int, read only where weights [...] (float32, >= 0, fractions allowed) is not 0. correct_sum: weighted number of
    rows whose target has the largest logit (a tie counts as correct). teacher = (hidden [..., D2], table [V, D2]) adds
    KL(teacher || student), or KL(student || teacher) with `reverse_kl`; `distill_weight` is a in the formula above. Of a teacher
    kept as `Likeliest` it is the divergence with all other tokens counted as one, which is never more than the whole.
    Gradients flow to hidden and table_VD through the loss only: not to the teacher, the weights or from the sums.
    On a mesh give [B, T] rows, which are cut as the batch is; `chunk` counts the rows of one device.
    """
    _check(hidden, table_VD, targets, weights, teacher, distill_weight)
    cut = cut_of(weights.shape, table_VD.shape[0])
    mine = weights.size // cut.size(cut.copies + cut.shared)
    if chunk is None:
        chunk = default_chunk(table_VD.shape[0]) if cut.mesh is None else mesh_chunk(table_VD.shape[0], cut)
    options = Options(softcap, max(1, min(chunk, mine)), float(distill_weight), reverse_kl, cut)
    with jax.named_scope("loss"):
        return _losses(options, hidden, table_VD, targets, weights.astype(jnp.float32), teacher)


def default_chunk(vocabulary: int) -> int:
    """Rows per chunk so that their float32 logits fill CHUNK_BYTES."""
    return max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))


def mesh_chunk(vocabulary: int, cut: Cut) -> int:
    """Rows per chunk and device on a mesh, whole tiles of 16."""
    local = vocabulary // cut.size(cut.vocabulary)
    rows = max(default_chunk(vocabulary), min(MESH_CHUNK, MESH_CHUNK_BYTES // (4 * local)))
    return max(16, rows // cut.size(cut.shared) // 16 * 16)


def loss_chunks(tokens_shape: tuple[int, ...], vocabulary: int) -> int:
    """How often the loop over chunks runs if every token is trained, on the current mesh."""
    cut = cut_of(tokens_shape, vocabulary)
    chunk = default_chunk(vocabulary) if cut.mesh is None else mesh_chunk(vocabulary, cut)
    return -(-(math.prod(tokens_shape) // cut.size(cut.shared + cut.copies)) // chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    options: Options,
    hidden: jax.Array,
    table_VD: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher,
) -> tuple[jax.Array, Sums]:
    def local(hidden, table_VD, targets, weights, teacher):
        rows = _sorted_rows(options, hidden, targets, weights, teacher)

        def step(i, carry):
            part, sums = carry
            ahead = _chunk_of(rows, i + 1, options)
            taught = _taught(options, part, teacher)
            _, new = _chunk_loss(_raw_logits(part.hidden, table_VD), part, taught, options)
            return ahead, jax.tree.map(jnp.add, sums, new)

        start = _chunk_of(rows, 0, options), _zero_sums()
        return _all_sums(options, jax.lax.fori_loop(0, _chunks(rows, options), step, start)[1])

    out = PartitionSpec()
    return _result(options, _on_mesh(options, local, teacher, out)(hidden, table_VD, targets, weights, teacher))


def _forward(options: Options, *given: Any) -> tuple[tuple[jax.Array, Sums], tuple[jax.Array, jax.Array | None]]:
    """The result of `_losses` and its gradients; each array of `given` says whether it is differentiated by."""
    learns = given[1].perturbed
    hidden, table_VD, targets, weights, teacher = jax.tree.map(lambda each: each.value, given)

    def local(hidden, table_VD, targets, weights, teacher):
        rows = _sorted_rows(options, hidden, targets, weights, teacher)

        def step(i, carry):
            part, sums, d_hidden, d_table = carry
            ahead = _chunk_of(rows, i + 1, options)
            taught = _taught(options, part, teacher)
            raw = _raw_logits(part.hidden, table_VD)
            d_raw, new = jax.grad(_chunk_loss, has_aux=True)(raw, part, taught, options)
            # Computed once: XLA for TPUs repeats exp and tanh in each product otherwise (5.4 million cycles a chunk, not 3.3).
            d_raw = jax.lax.optimization_barrier(d_raw.astype(hidden.dtype))
            d_rows = jnp.einsum("MV,VD->MD", d_raw, table_VD, preferred_element_type=jnp.float32)
            d_rows = scatter_total(d_rows.astype(hidden.dtype), options.cut)
            d_hidden = write(d_hidden, d_rows, i * options.chunk)
            if learns:
                d_table += jnp.einsum("MV,MD->VD", d_raw, part.hidden, preferred_element_type=jnp.float32)
            return ahead, jax.tree.map(jnp.add, sums, new), d_hidden, d_table

        no_table = jnp.zeros(table_VD.shape, jnp.float32) if learns else None
        start = _chunk_of(rows, 0, options), _zero_sums(), buffer(rows.hidden.shape, hidden.dtype), no_table
        _, sums, d_sorted, d_table = jax.lax.fori_loop(0, _chunks(rows, options), step, start)
        d_hidden = value(d_sorted[jnp.argsort(rows.order)], hidden.dtype).reshape(hidden.shape)
        if learns:
            d_table = narrowed(total(d_table, options.cut.copies), table_VD.dtype)
        # Together, so that the float32 gradient of the table is not kept until the lookup's is added to it.
        return _all_sums(options, sums), jax.lax.optimization_barrier((d_hidden, d_table))

    out = PartitionSpec(), (options.cut.vectors, options.cut.table if learns else None)
    sums, gradients = _on_mesh(options, local, teacher, out)(hidden, table_VD, targets, weights, teacher)
    return _result(options, sums), gradients


def _on_mesh(options: Options, local, teacher: Teacher, out):
    cut = options.cut
    ours = cut.vectors, cut.table
    said = PartitionSpec() if teacher is None else ours
    if isinstance(teacher, Likeliest):
        said = Likeliest(cut.vectors, cut.vectors)
    return island(cut, local, (*ours, cut.tokens, cut.tokens, said), out)


def _all_sums(options: Options, sums: Sums) -> Sums:
    """Devices that hold a table together all have the sums of all their rows."""
    return {name: total(x, options.cut.copies) for name, x in sums.items()}


def _backward(_options: Options, residuals: tuple[jax.Array, jax.Array | None], cotangents: tuple[Any, Sums]) -> tuple:
    d_loss, _ = cotangents
    if isinstance(d_loss, SymbolicZero):
        return None, None, None, None, None
    d_hidden, d_table = (None if d is None else d * d_loss.astype(d.dtype) for d in residuals)
    return d_hidden, d_table, None, None, None


# With symbolic zeros the forward pass is told what is differentiated by.
_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _sorted_rows(options: Options, hidden: jax.Array, targets: jax.Array, weights: jax.Array, teacher: Teacher) -> Rows:
    weights_M = weights.reshape(-1)
    order = jnp.argsort(weights_M == 0, stable=True)
    padding = -order.shape[0] % options.chunk

    def arrange(x):
        x = x.reshape(order.shape[0], *x.shape[weights.ndim :])
        return jnp.pad(x[order], [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    def of_all(x):
        """[devices, rows]: a few bytes a row, so they are sent once and not with every chunk."""
        return gather(arrange(x)[None], options.cut.shared)

    used = (weights_M != 0).sum(dtype=jnp.int32)
    said = teacher if isinstance(teacher, Likeliest) else () if teacher is None else teacher[:1]
    return Rows(order, arrange(hidden), of_all(targets), of_all(weights), tuple(map(arrange, said)), used)


def _chunk_of(rows: Rows, i: jax.Array | int, options: Options) -> Rows:
    """Chunk i of every device that holds the table with this one; the last chunk where there is none."""
    start = jnp.minimum(i * options.chunk, rows.hidden.shape[0] - options.chunk)

    def vectors(x):
        return gather(read(x, start, options.chunk), options.cut.shared)

    def numbers(x):
        return read(x, start, options.chunk, axis=1).reshape(-1)

    return Rows(
        rows.order,
        vectors(rows.hidden),
        numbers(rows.targets),
        numbers(rows.weights),
        tuple(map(vectors, rows.teacher)),
        rows.used,
    )


def _chunks(rows: Rows, options: Options) -> jax.Array:
    """As many on every device, for they wait for each other."""
    used = jax.lax.pmax(rows.used, options.cut.everyone) if options.cut.everyone else rows.used
    return (used + options.chunk - 1) // options.chunk


def _raw_logits(hidden_MD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("MD,VD->MV", hidden_MD, table_VD, preferred_element_type=jnp.float32)


def _capped(raw_MV, softcap: float | None):
    return raw_MV if softcap is None else softcap * jnp.tanh(raw_MV / softcap)


def _taught(options: Options, part: Rows, teacher: Teacher) -> jax.Array | Likeliest | None:
    """What the teacher says of a chunk: its log-probabilities of this device's part of the vocabulary, or what is kept of them."""
    if teacher is None:
        return None
    if isinstance(teacher, Likeliest):
        return Likeliest(*part.teacher)
    logits = _capped(_raw_logits(part.teacher[0], teacher[1]), options.softcap)
    if not options.cut.vocabulary:
        return jax.lax.stop_gradient(jax.nn.log_softmax(logits, axis=-1))
    return jax.lax.stop_gradient(logits - _lse(logits, _max(logits, options.cut), options.cut)[:, None])


def _chunk_loss(
    raw_MV: jax.Array, part: Rows, taught: jax.Array | Likeliest | None, options: Options
) -> tuple[jax.Array, Sums]:
    """The loss of one chunk as a function of its uncapped logits, and the three sums.

    On a mesh the logits are those of this device's part of the vocabulary, and so is the gradient; the loss is the whole.
    """
    cut = options.cut
    logits = _capped(raw_MV, options.softcap)
    top_M = _max(logits, cut)
    lse_M = _lse(logits, top_M, cut)
    # A comparison instead of a gather: its gradient is a select inside the same loop, not a scatter into [M, V].
    columns = jnp.arange(raw_MV.shape[1], dtype=part.targets.dtype) + cut.first_row(raw_MV.shape[1])
    is_target = columns[None, :] == part.targets[:, None]
    target_M = _over_vocabulary(cut, jnp.where(is_target, logits, 0.0).sum(axis=-1))
    hit_M = (target_M >= top_M).astype(jnp.float32)
    ce = (part.weights * (lse_M - target_M)).sum()
    kl = jnp.zeros((), jnp.float32)
    if isinstance(taught, Likeliest):
        log_p = _log_p_of(taught.ids, logits, lse_M, cut)
        kl = (part.weights * _divergence(log_p, taught.log_p, options)).sum()
    elif taught is not None:
        log_p = logits - _to_every_part(cut, lse_M)[:, None]
        kl = (part.weights * _over_vocabulary(cut, _divergence(log_p, taught, options))).sum()
    sums = {"ce_sum": ce, "kl_sum": kl, "correct_sum": (part.weights * hit_M).sum()}
    return _result(options, sums)[0], sums


def _divergence(log_p: jax.Array, log_t: jax.Array, options: Options) -> jax.Array:
    """KL of the teacher's and the student's log-probabilities over the last axis, this device's part of it."""
    first, second = (log_p, log_t) if options.reverse_kl else (log_t, log_p)
    return (jnp.exp(first) * (first - second)).sum(axis=-1)


def _log_p_of(ids_MK: jax.Array, logits_MV: jax.Array, lse_M: jax.Array, cut: Cut) -> jax.Array:
    """The student's log-probabilities of these tokens and of all others together [M, K + 1]."""
    columns = logits_MV.shape[1]
    at_MK = ids_MK - cut.first_row(columns)
    here = (at_MK >= 0) & (at_MK < columns)
    picked = jnp.take_along_axis(logits_MV, jnp.clip(at_MK, 0, columns - 1), axis=1)
    log_p_MK = _over_vocabulary(cut, jnp.where(here, picked, 0.0)) - lse_M[:, None]
    rest_M = jnp.maximum(1.0 - jnp.exp(log_p_MK).sum(axis=-1), LEAST_REST)
    return jnp.concatenate([log_p_MK, jnp.log(rest_M)[:, None]], axis=-1)


def _max(logits_MV: jax.Array, cut: Cut) -> jax.Array:
    top_M = jax.lax.stop_gradient(logits_MV).max(axis=-1)
    return jax.lax.pmax(top_M, cut.vocabulary) if cut.vocabulary else top_M


def _lse(logits_MV: jax.Array, top_M: jax.Array, cut: Cut) -> jax.Array:
    """log sum exp over the whole vocabulary [M], whose maximum is top_M."""
    if not cut.vocabulary:
        return jax.nn.logsumexp(logits_MV, axis=-1)
    return top_M + jnp.log(_over_vocabulary(cut, jnp.exp(logits_MV - top_M[:, None]).sum(axis=-1)))


# The two ways between a part of the vocabulary and the whole, where every device computes the same loss: the derivative of
# each is what the other does.
def _over_vocabulary(cut: Cut, x_M: jax.Array) -> jax.Array:
    """The sum over devices; its cotangent, the same on all, is that of each term."""
    return cast(jax.Array, _summed(cut.vocabulary, x_M))


def _to_every_part(cut: Cut, x_M: jax.Array) -> jax.Array:
    """x as it is, the same on all devices; its cotangent is the sum of what each device's part contributes."""
    return cast(jax.Array, _shared(cut.vocabulary, x_M))


_summed = jax.custom_vjp(lambda axes, x: total(x, axes), nondiff_argnums=(0,))
_summed.defvjp(lambda axes, x: (total(x, axes), None), lambda _axes, _, d: (d,))
_shared = jax.custom_vjp(lambda _axes, x: x, nondiff_argnums=(0,))
_shared.defvjp(lambda _axes, x: (x, None), lambda axes, _, d: (total(d, axes),))


def _result(options: Options, sums: Sums) -> tuple[jax.Array, Sums]:
    a = options.distill_weight
    return (1.0 - a) * sums["ce_sum"] + a * sums["kl_sum"], sums


def _zero_sums() -> Sums:
    return {name: jnp.zeros((), jnp.float32) for name in ("ce_sum", "kl_sum", "correct_sum")}


def _check(
    hidden: jax.Array,
    table_VD: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher,
    distill_weight: float,
) -> None:
    rows, vocabulary = hidden.shape[:-1], table_VD.shape[0]
    if hidden.shape[-1:] != table_VD.shape[1:] or targets.shape != rows or weights.shape != rows:
        raise ValueError(
            "token_losses wants hidden [..., D], table [V, D], targets [...] and weights [...], got "
            f"{hidden.shape}, {table_VD.shape}, {targets.shape} and {weights.shape}"
        )
    if hidden.dtype != table_VD.dtype:
        raise ValueError(f"hidden and table must have one dtype, got {hidden.dtype} and {table_VD.dtype}; cast one")
    if teacher is None and distill_weight:
        raise ValueError(
            f"distill_weight={distill_weight} needs a teacher; pass teacher=(hidden, table) or a Likeliest"
        )
    if isinstance(teacher, Likeliest):
        kept = teacher.ids.shape
        if kept[:-1] != rows or teacher.log_p.shape != (*rows, kept[-1] + 1) or kept[-1] > vocabulary:
            raise ValueError(
                f"the teacher's likeliest must be ids {rows} + [K] of at most {vocabulary} and log_p [K + 1], got "
                f"{kept} and {teacher.log_p.shape}"
            )
    elif teacher is not None and (teacher[0].shape[:-1] != rows or teacher[1].shape[0] != vocabulary):
        raise ValueError(
            f"the teacher must have {rows} rows and {vocabulary} classes as the student has, got hidden "
            f"{teacher[0].shape} and table {teacher[1].shape}"
        )

"""The loss over 262,144 classes without ever holding [tokens, classes]: a chunk of rows at a time, gradients included.

loss = sum over rows of weight * ((1 - a) * CE + a * KL), with logits = softcap * tanh(h . E^T / softcap) in float32,
or h . E^T where softcap is None.
Rows of weight 0 are sorted to the end and never multiplied. When the loss is differentiated, the forward pass computes
the gradients chunk by chunk while the logits are there (three products per chunk, nothing recomputed) and the backward
pass only scales them. Soft cap: Gemma 2 report (arXiv:2408.00118), section 2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.kernels.slices import buffer, read, value, write

# One float32 chunk of logits takes this much; about three such arrays live at a time. A chunk also costs one pass over
# the float32 gradient of the table, so there is a least number of rows. 512 rows of a vocabulary of 32,768 (on CPU 256
# rows were 5 to 16 % faster than 1,024, and 64 rows 15 to 30 % slower than 256); 128 rows (128 MiB) of Gemma's 262,144.
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK = 128

Teacher = tuple[jax.Array, jax.Array] | None
Sums = dict[str, jax.Array]


class Options(NamedTuple):
    softcap: float | None
    chunk: int
    distill_weight: float
    reverse_kl: bool


class Rows(NamedTuple):
    """Rows in the order they are processed, padded to whole chunks; `used` of them have a weight."""

    order: jax.Array
    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    teacher_hidden: jax.Array | None
    used: jax.Array


def token_losses(
    hidden_MD: jax.Array,
    table_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    *,
    softcap: float | None,
    chunk: int | None = None,
    teacher: Teacher = None,
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the losses, and {"ce_sum", "kl_sum", "correct_sum"}: float32 scalars.

    hidden_MD, table_VD: one floating dtype; the products are summed in float32. targets_M: int, read only where
    weights_M (float32, >= 0, fractions allowed) is not 0. correct_sum: weighted number of rows whose target has the
    largest logit (a tie counts as correct). teacher = (hidden [M, D2], table [V, D2]) adds KL(teacher || student), or
    KL(student || teacher) with `reverse_kl`; `distill_weight` is a in the formula above. Gradients flow to hidden_MD
    and table_VD through the loss only: not to the teacher, the weights or from the sums.
    """
    _check(hidden_MD, table_VD, targets_M, weights_M, teacher, distill_weight)
    rows = default_chunk(table_VD.shape[0]) if chunk is None else chunk
    rows = max(1, min(rows, hidden_MD.shape[0]))
    options = Options(softcap, rows, float(distill_weight), reverse_kl)
    return _losses(options, hidden_MD, table_VD, targets_M, weights_M.astype(jnp.float32), teacher)


def default_chunk(vocabulary: int) -> int:
    """Rows per chunk so that their float32 logits fill CHUNK_BYTES."""
    return max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    options: Options,
    hidden_MD: jax.Array,
    table_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    teacher: Teacher,
) -> tuple[jax.Array, Sums]:
    rows = _sorted_rows(options, hidden_MD, targets_M, weights_M, teacher)

    def step(i, sums):
        part = _chunk_of(rows, i, options.chunk)
        _, new = _chunk_loss(_raw_logits(part.hidden, table_VD), part, _teacher_log_p(options, part, teacher), options)
        return jax.tree.map(jnp.add, sums, new)

    return _result(options, jax.lax.fori_loop(0, _chunks(rows, options), step, _zero_sums()))


def _forward(
    options: Options,
    hidden_MD: jax.Array,
    table_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    teacher: Teacher,
) -> tuple[tuple[jax.Array, Sums], tuple[jax.Array, jax.Array]]:
    rows = _sorted_rows(options, hidden_MD, targets_M, weights_M, teacher)

    def step(i, carry):
        sums, d_hidden, d_table = carry
        part = _chunk_of(rows, i, options.chunk)
        log_t = _teacher_log_p(options, part, teacher)
        raw = _raw_logits(part.hidden, table_VD)
        d_raw, new = jax.grad(_chunk_loss, has_aux=True)(raw, part, log_t, options)
        d_raw = d_raw.astype(hidden_MD.dtype)
        d_rows = jnp.einsum("MV,VD->MD", d_raw, table_VD, preferred_element_type=jnp.float32)
        d_hidden = write(d_hidden, d_rows.astype(hidden_MD.dtype), i * options.chunk)
        d_table += jnp.einsum("MV,MD->VD", d_raw, part.hidden, preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, sums, new), d_hidden, d_table

    zeros = _zero_sums(), buffer(rows.hidden.shape, hidden_MD.dtype), jnp.zeros(table_VD.shape, jnp.float32)
    sums, d_sorted, d_table = jax.lax.fori_loop(0, _chunks(rows, options), step, zeros)
    d_hidden = value(d_sorted[jnp.argsort(rows.order)], hidden_MD.dtype)
    return _result(options, sums), (d_hidden, d_table.astype(table_VD.dtype))


def _backward(_options: Options, residuals: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, Sums]) -> tuple:
    d_loss, _ = cotangents
    d_hidden, d_table = (d * d_loss.astype(d.dtype) for d in residuals)
    return d_hidden, d_table, None, None, None


_losses.defvjp(_forward, _backward)


def _sorted_rows(
    options: Options, hidden_MD: jax.Array, targets_M: jax.Array, weights_M: jax.Array, teacher: Teacher
) -> Rows:
    order = jnp.argsort(weights_M == 0, stable=True)
    padding = -order.shape[0] % options.chunk

    def arrange(x):
        return jnp.pad(x[order], [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    used = (weights_M != 0).sum(dtype=jnp.int32)
    teacher_hidden = None if teacher is None else arrange(teacher[0])
    return Rows(order, arrange(hidden_MD), arrange(targets_M), arrange(weights_M), teacher_hidden, used)


def _chunk_of(rows: Rows, i: jax.Array, size: int) -> Rows:
    def cut(x):
        return None if x is None else read(x, i * size, size)

    return rows._replace(
        **{name: cut(getattr(rows, name)) for name in ("hidden", "targets", "weights", "teacher_hidden")}
    )


def _chunks(rows: Rows, options: Options) -> jax.Array:
    return (rows.used + options.chunk - 1) // options.chunk


def _raw_logits(hidden_MD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("MD,VD->MV", hidden_MD, table_VD, preferred_element_type=jnp.float32)


def _capped(raw_MV, softcap: float | None):
    return raw_MV if softcap is None else softcap * jnp.tanh(raw_MV / softcap)


def _teacher_log_p(options: Options, part: Rows, teacher: Teacher) -> jax.Array | None:
    if teacher is None or part.teacher_hidden is None:
        return None
    raw = _raw_logits(part.teacher_hidden, teacher[1])
    return jax.lax.stop_gradient(jax.nn.log_softmax(_capped(raw, options.softcap), axis=-1))


def _chunk_loss(raw_MV: jax.Array, part: Rows, log_t_MV: jax.Array | None, options: Options) -> tuple[jax.Array, Sums]:
    """The loss of one chunk as a function of its uncapped logits, and the three sums."""
    logits = _capped(raw_MV, options.softcap)
    lse_M = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: its gradient is a select inside the same loop, not a scatter into [M, V].
    is_target = jnp.arange(raw_MV.shape[1], dtype=part.targets.dtype)[None, :] == part.targets[:, None]
    target_M = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    hit_M = (target_M >= jax.lax.stop_gradient(logits).max(axis=-1)).astype(jnp.float32)
    ce = (part.weights * (lse_M - target_M)).sum()
    kl = jnp.zeros((), jnp.float32)
    if log_t_MV is not None:
        log_p = logits - lse_M[:, None]
        first, second = (log_p, log_t_MV) if options.reverse_kl else (log_t_MV, log_p)
        kl = (part.weights * (jnp.exp(first) * (first - second)).sum(axis=-1)).sum()
    sums = {"ce_sum": ce, "kl_sum": kl, "correct_sum": (part.weights * hit_M).sum()}
    return _result(options, sums)[0], sums


def _result(options: Options, sums: Sums) -> tuple[jax.Array, Sums]:
    a = options.distill_weight
    return (1.0 - a) * sums["ce_sum"] + a * sums["kl_sum"], sums


def _zero_sums() -> Sums:
    return {name: jnp.zeros((), jnp.float32) for name in ("ce_sum", "kl_sum", "correct_sum")}


def _check(
    hidden_MD: jax.Array,
    table_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    teacher: Teacher,
    distill_weight: float,
) -> None:
    rows, vocabulary = hidden_MD.shape[0], table_VD.shape[0]
    if hidden_MD.shape[1:] != table_VD.shape[1:] or targets_M.shape != (rows,) or weights_M.shape != (rows,):
        raise ValueError(
            "token_losses wants hidden [M, D], table [V, D], targets [M] and weights [M], got "
            f"{hidden_MD.shape}, {table_VD.shape}, {targets_M.shape} and {weights_M.shape}"
        )
    if hidden_MD.dtype != table_VD.dtype:
        raise ValueError(f"hidden and table must have one dtype, got {hidden_MD.dtype} and {table_VD.dtype}; cast one")
    if teacher is None and distill_weight:
        raise ValueError(f"distill_weight={distill_weight} needs a teacher; pass teacher=(hidden, table)")
    if teacher is not None and (teacher[0].shape[0] != rows or teacher[1].shape[0] != vocabulary):
        raise ValueError(
            f"the teacher must have {rows} rows and {vocabulary} classes as the student has, got hidden "
            f"{teacher[0].shape} and table {teacher[1].shape}"
        )

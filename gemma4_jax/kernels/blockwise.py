"""Attention one block of queries at a time, with a backward pass that recomputes the scores.

`banded.py` and `chunked.py` decide which keys a block of queries has to look at; this file does the arithmetic.
The forward pass keeps the output and one float32 number per query and head (the log of the softmax denominator);
the backward pass needs the scores of one block only. The formulas are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691, section 3.1) with a block of queries against all of its keys at once, so there is no running maximum.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.kernels.slices import Index, buffer, read, value, write

# Scores of hidden pairs get HIDDEN added; the row maximum is never below FLOOR. exp(HIDDEN - FLOOR) is exactly 0, so
# a row that sees nothing has a zero sum instead of NaN, and hidden pairs vanish in the backward pass without a mask.
HIDDEN = -1e30
FLOOR = -1e20

GROUPS = 8


class Span(NamedTuple):
    """`count` consecutive blocks of `rows` queries; block i looks at keys [k_start + i * k_stride, ... + k_len)."""

    q_start: int
    rows: int
    count: int
    k_start: int
    k_stride: int
    k_len: int


class Labels(NamedTuple):
    """What decides who sees whom: positions (-1 = padding) and optional segment ids, all int32.

    `q_last_BT` is the last position each query sees, its own or later: the end of the image it belongs to. None: its own.
    """

    q_pos_BT: jax.Array
    k_pos_BS: jax.Array
    q_seg_BT: jax.Array | None
    k_seg_BS: jax.Array | None
    q_last_BT: jax.Array | None = None


def causal_spans(length: int, rows: int, ahead: int = 0) -> tuple[Span, ...]:
    """Spans for queries that see at most `ahead` slots after their own: at most GROUPS groups, whose keys end so far behind.

    8 groups do 9/16 of the products of a full [length, length] matrix (the half that is needed would be 8/16).
    """
    whole, rest = divmod(length, rows)
    groups = min(GROUPS, whole)
    edges = [whole * g // groups for g in range(groups + 1)] if groups else []
    spans = [Span(a * rows, rows, b - a, 0, 0, min(length, b * rows + ahead)) for a, b in itertools.pairwise(edges)]
    if rest:
        spans.append(Span(whole * rows, rest, 1, 0, 0, length))
    return tuple(spans)


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    labels: Labels,
    *,
    spans: tuple[Span, ...],
    window: int | None,
) -> jax.Array:
    """Attention of every query against the keys its span names; [B, T, N, H] in the dtype of `q_BTNH`.

    The spans must cover each query once. Pairs outside a span are never looked at, pairs inside are masked by `labels`.
    """
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of kv heads, got {heads} and {kv_heads}")
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    # Heads before time: every product below is then one plain matrix product per (batch, kv head).
    out_BKTGH = _attend(spans, window, q_BTKGH.swapaxes(1, 2), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), labels)
    return out_BKTGH.swapaxes(1, 2).reshape(q_BTNH.shape)


def _primal(
    spans: tuple[Span, ...],
    window: int | None,
    q_BKTGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    labels: Labels,
) -> jax.Array:
    return forward(spans, window, q_BKTGH, k_BKSH, v_BKSH, labels)[0]


def forward(
    spans: tuple[Span, ...],
    window: int | None,
    q_BKTGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    labels: Labels,
) -> tuple[jax.Array, tuple]:
    """Attention of queries [B, K, T, G, H], and what `backward` needs: the arguments, the output, log of the denominators."""

    def block(span, i, carry):
        out, lse = carry
        q_at, k_at = span.q_start + i * span.rows, span.k_start + i * span.k_stride
        q = read(q_BKTGH, q_at, span.rows, 2)
        k, v = read(k_BKSH, k_at, span.k_len, 2), read(v_BKSH, k_at, span.k_len, 2)
        scores = _scores(q, k, _bias(labels, span, q_at, k_at, window))
        top = jnp.maximum(scores.max(axis=-1), FLOOR)
        p = jnp.exp(scores - top[..., None])
        total = p.sum(axis=-1)
        seen = total > 0
        o = jnp.einsum("BKTGS,BKSH->BKTGH", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        o = (o / jnp.where(seen, total, 1.0)[..., None]).astype(q.dtype)
        row_lse = top + jnp.log(jnp.where(seen, total, 1.0))
        return write(out, o, q_at, 2), write(lse, row_lse, q_at, 2)

    carry = buffer(q_BKTGH.shape, q_BKTGH.dtype), jnp.zeros(q_BKTGH.shape[:-1], jnp.float32)
    out, lse = _run(spans, block, carry)
    out = value(out, q_BKTGH.dtype)
    return out, (q_BKTGH, k_BKSH, v_BKSH, labels, out, lse)


def backward(spans: tuple[Span, ...], window: int | None, residuals: tuple, d_out: jax.Array) -> tuple:
    """Gradients of q, k and v for `d_out` [B, K, T, G, H]; None for the labels."""
    q_BKTGH, k_BKSH, v_BKSH, labels, out_BKTGH, lse_BKTG = residuals

    def block(span, i, carry):
        dq_all, dk_all, dv_all = carry
        q_at, k_at = span.q_start + i * span.rows, span.k_start + i * span.k_stride
        q, o, do = (read(x, q_at, span.rows, 2) for x in (q_BKTGH, out_BKTGH, d_out))
        k, v = read(k_BKSH, k_at, span.k_len, 2), read(v_BKSH, k_at, span.k_len, 2)
        lse = read(lse_BKTG, q_at, span.rows, 2)
        p = jnp.exp(_scores(q, k, _bias(labels, span, q_at, k_at, window)) - lse[..., None])
        delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=-1)
        dp = jnp.einsum("BKTGH,BKSH->BKTGS", do, v, preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[..., None])).astype(q.dtype)
        dv = jnp.einsum("BKTGS,BKTGH->BKSH", p.astype(do.dtype), do, preferred_element_type=jnp.float32)
        dk = jnp.einsum("BKTGS,BKTGH->BKSH", ds, q, preferred_element_type=jnp.float32)
        dq = jnp.einsum("BKTGS,BKSH->BKTGH", ds, k, preferred_element_type=jnp.float32)
        dk_all = write(dk_all, read(dk_all, k_at, span.k_len, 2) + dk, k_at, 2)
        dv_all = write(dv_all, read(dv_all, k_at, span.k_len, 2) + dv, k_at, 2)
        return write(dq_all, dq.astype(q.dtype), q_at, 2), dk_all, dv_all

    zeros = (
        buffer(q_BKTGH.shape, q_BKTGH.dtype),
        jnp.zeros(k_BKSH.shape, jnp.float32),
        jnp.zeros(v_BKSH.shape, jnp.float32),
    )
    dq, dk, dv = _run(spans, block, zeros)
    return value(dq, q_BKTGH.dtype), dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), None


_attend = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))
_attend.defvjp(forward, backward)


def _run(spans: tuple[Span, ...], block: Callable, carry: tuple) -> tuple:
    """Every block of every span in turn; a span of several blocks is one loop in the compiled program."""
    for span in spans:
        if span.count == 1:
            carry = block(span, 0, carry)
        else:
            carry = jax.lax.fori_loop(0, span.count, functools.partial(block, span), carry)
    return carry


def _scores(q: jax.Array, k: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    scores = jnp.einsum("BKTGH,BKSH->BKTGS", q, k, preferred_element_type=jnp.float32)
    return scores + bias_BTS[:, None, :, None, :]


def _bias(labels: Labels, span: Span, q_at: Index, k_at: Index, window: int | None) -> jax.Array:
    """0 where a query sees a key, HIDDEN elsewhere; float32 [B, rows, k_len]."""
    q = read(labels.q_pos_BT, q_at, span.rows, 1)[:, :, None]
    k = read(labels.k_pos_BS, k_at, span.k_len, 1)[:, None, :]
    last = q if labels.q_last_BT is None else read(labels.q_last_BT, q_at, span.rows, 1)[:, :, None]
    visible = (q >= 0) & (k >= 0) & (k <= last)
    if window is not None:
        visible &= k > q - window
    if labels.q_seg_BT is not None and labels.k_seg_BS is not None:
        q_seg = read(labels.q_seg_BT, q_at, span.rows, 1)[:, :, None]
        visible &= q_seg == read(labels.k_seg_BS, k_at, span.k_len, 1)[:, None, :]
    return jnp.where(visible, jnp.float32(0.0), jnp.float32(HIDDEN))

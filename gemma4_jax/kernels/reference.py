"""The slow, obvious twins of the kernels: they are the specification, everything else is compared against them.

They materialise everything ([T, S] scores, [M, V] logits, every expert for every row) and differentiate by plain
`jax.grad`, so they serve tests and nothing else.
"""

import jax
import jax.numpy as jnp


def visible_pairs(
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None = None,
    k_seg_BS: jax.Array | None = None,
    q_last_BT: jax.Array | None = None,
    *,
    window: int | None,
) -> jax.Array:
    """Which query sees which key: bool [B, T, S].

    A key is seen if neither side is padding (position -1), it is not later than the query (than `q_last_BT`, if given), it is
    one of the last `window` positions including the query's own or a later one, and both carry the same segment id (when
    segments are given).
    """
    q, k = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    last = q if q_last_BT is None else q_last_BT[:, :, None]
    visible = (q >= 0) & (k >= 0) & (k <= last)
    if window is not None:
        visible &= k > q - window
    if q_seg_BT is not None and k_seg_BS is not None:
        visible &= q_seg_BT[:, :, None] == k_seg_BS[:, None, :]
    return visible


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None = None,
    k_seg_BS: jax.Array | None = None,
    q_last_BT: jax.Array | None = None,
    *,
    window: int | None,
) -> jax.Array:
    """Grouped-query attention with scale 1.0; returns [B, T, N, H] in the dtype of `q_BTNH`.

    Softmax in float32. A query that sees no key gives zeros, and zero gradients.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH = jnp.repeat(k_BSKH, groups, axis=2).astype(jnp.float32)
    v_BSNH = jnp.repeat(v_BSKH, groups, axis=2).astype(jnp.float32)
    visible = visible_pairs(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, q_last_BT, window=window)[:, None, :, :]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH.astype(jnp.float32), k_BSNH)
    scores = jnp.where(visible, scores, -1e30)
    probabilities = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", probabilities, v_BSNH).astype(q_BTNH.dtype)


def grouped_matmul(lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Row m of [M, K] times the matrix of its expert; the first `group_sizes_E[0]` rows are expert 0's, and so on."""
    experts = rhs_EKN.shape[0]
    expert_M = jnp.repeat(jnp.arange(experts), group_sizes_E, total_repeat_length=lhs_MK.shape[0])
    chosen_ME = jax.nn.one_hot(expert_M, experts, dtype=jnp.float32)
    every_MEN = jnp.einsum("MK,EKN->MEN", lhs_MK.astype(jnp.float32), rhs_EKN.astype(jnp.float32))
    return jnp.einsum("MEN,ME->MN", every_MEN, chosen_ME).astype(lhs_MK.dtype)


def capped_logits(hidden_MD: jax.Array, table_VD: jax.Array, softcap: float) -> jax.Array:
    """softcap * tanh(h . E^T / softcap), float32 [M, V]."""
    raw = jnp.einsum("MD,VD->MV", hidden_MD.astype(jnp.float32), table_VD.astype(jnp.float32))
    return softcap * jnp.tanh(raw / softcap)


def token_losses(
    hidden_MD: jax.Array,
    table_VD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    *,
    softcap: float,
    teacher: tuple[jax.Array, jax.Array] | None = None,
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over rows of weight * ((1 - a) * cross-entropy + a * KL), a = `distill_weight`; see `cross_entropy.py`."""
    logits = capped_logits(hidden_MD, table_VD, softcap)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    safe_targets = jnp.where(weights_M > 0, targets_M, 0)
    ce_M = -jnp.take_along_axis(log_p, safe_targets[:, None], axis=1)[:, 0]
    kl_M = jnp.zeros_like(ce_M)
    if teacher is not None:
        log_t = jax.nn.log_softmax(jax.lax.stop_gradient(capped_logits(*teacher, softcap)), axis=-1)
        first, second = (log_p, log_t) if reverse_kl else (log_t, log_p)
        kl_M = (jnp.exp(first) * (first - second)).sum(axis=-1)
    hits_M = (logits.argmax(axis=-1) == safe_targets).astype(jnp.float32)
    ce, kl, hits = ((weights_M * x).sum() for x in (ce_M, kl_M, hits_M))
    return (1.0 - distill_weight) * ce + distill_weight * kl, {"ce_sum": ce, "kl_sum": kl, "correct_sum": hits}

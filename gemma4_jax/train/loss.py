"""The loss of a batch: cross-entropy, or with a teacher its mixture with the KL divergence, summed over trained tokens."""

from collections.abc import Mapping
from typing import Any

import jax

from gemma4_jax.kernels.cross_entropy import token_losses
from gemma4_jax.model.moe import ExpertLoad, balance_loss, load_stats
from gemma4_jax.model.transformer import Transformer

Batch = Mapping[str, Any]
"""tokens, positions (-1 padding), segment_ids (0 padding), targets: int32 [B, T]; loss_weights: float32 [B, T]; with pictures or
sounds media: `Media`; where the teacher answered before, taught: `Likeliest` [B, T, K]."""


def loss_sum(
    model: Transformer,
    batch: Batch,
    *,
    teacher: Transformer | None = None,
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
    remat: str = "none",
    balance_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the token losses and the sums behind it, float32 scalars.

    Sums, not means: micro-batches and processes add up before anything is divided, so how a batch is cut does not
    change its loss. Logits exist only a chunk at a time (`kernels.cross_entropy`). A mixture of experts adds the sums
    `balance_sum`, `max_load_sum` and `unused_sum`: what `model.moe` says of the micro-batch, times its trained tokens; and
    `balance_weight` times the first to the loss.
    """
    hidden, table, load = _head_inputs(model, batch, remat)
    taught = batch.get("taught")
    if teacher is not None:
        taught = jax.lax.stop_gradient(_head_inputs(teacher, batch, remat)[:2])
    total, sums = token_losses(
        hidden,
        table,
        batch["targets"],
        batch["loss_weights"],
        softcap=model.cfg.final_logit_softcapping,
        teacher=taught,
        distill_weight=distill_weight,
        reverse_kl=reverse_kl,
    )
    if load is None:
        return total, sums
    trained = batch["loss_weights"].sum()
    spread = {"balance": balance_loss(load), **load_stats(load)}
    sums = {**sums, **{f"{name}_sum": trained * value for name, value in spread.items()}}
    return total + balance_weight * sums["balance_sum"], sums


def _head_inputs(model: Transformer, batch: Batch, remat: str) -> tuple[jax.Array, jax.Array, ExpertLoad | None]:
    hidden, load = model.hidden_and_load(
        batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("media"), remat=remat
    )
    return hidden, model.embed.head(hidden.dtype), load

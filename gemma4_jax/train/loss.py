"""The loss of a batch: cross-entropy, or with a teacher its mixture with the KL divergence, summed over trained tokens."""

from collections.abc import Mapping

import jax

from gemma4_jax.kernels.cross_entropy import token_losses
from gemma4_jax.model.transformer import Transformer

Batch = Mapping[str, jax.Array]
"""tokens, positions (-1 padding), segment_ids (0 padding), targets: int32 [B, T]; loss_weights: float32 [B, T]."""


def loss_sum(
    model: Transformer,
    batch: Batch,
    *,
    teacher: Transformer | None = None,
    distill_weight: float = 0.0,
    reverse_kl: bool = False,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the token losses and the sums behind it, float32 scalars.

    Sums, not means: micro-batches and processes add up before anything is divided, so how a batch is cut does not
    change its loss. Logits exist only a chunk at a time (`kernels.cross_entropy`).
    """
    hidden, table = _head_inputs(model, batch, remat)
    taught = None
    if teacher is not None:
        taught = jax.lax.stop_gradient(_head_inputs(teacher, batch, remat))
    return token_losses(
        hidden,
        table,
        batch["targets"].reshape(-1),
        batch["loss_weights"].reshape(-1),
        softcap=model.cfg.final_logit_softcapping,
        teacher=taught,
        distill_weight=distill_weight,
        reverse_kl=reverse_kl,
    )


def _head_inputs(model: Transformer, batch: Batch, remat: str) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], remat=remat)
    return hidden.reshape(-1, hidden.shape[-1]), model.embed.rounded().astype(hidden.dtype)

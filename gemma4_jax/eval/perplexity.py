"""Held-out loss: the mean cross-entropy of trained tokens, and what follows from it."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError
from gemma4_jax.kernels.cross_entropy import token_losses
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import place_batch


def evaluate_loss(
    model: Transformer, batches: Iterable[Mapping[str, Any]], *, max_batches: int | None = None
) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `accuracy` (share of targets with the largest logit) and `tokens` counted.

    Every trained token of all batches counts the same, whatever batch it stands in. Compiled once per batch shape; the model
    is an argument, so the next training step reuses the program.

    Args:
        model: with its quantisation grids, if it has some.
        batches: as training reads them: tokens, positions, segment_ids, targets int32 [B, T], loss_weights float32 [B, T], media.
        max_batches: how many of them; None: all, so they must end.

    Raises:
        UserError: no token to count.
    """
    sums = [_sums(model, dict(place_batch(batch))) for batch in islice(batches, max_batches)]
    totals = [math.fsum(column) for column in zip(*jax.device_get(sums), strict=True)] or [0.0] * 3
    loss, correct, tokens = totals
    if tokens <= 0:
        raise UserError(f"The {len(sums)} held-out batches have no trained token, so there is no loss to report.")
    mean = loss / tokens
    return {"loss": mean, "perplexity": math.exp(mean), "accuracy": correct / tokens, "tokens": tokens}


@jax.jit
def _sums(model: Transformer, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy, right answers and tokens of a batch, summed; float32 scalars."""
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("media"))
    weights = jnp.asarray(batch["loss_weights"])
    _, sums = token_losses(
        hidden,
        model.embed.head(hidden.dtype),
        jnp.asarray(batch["targets"]),
        weights,
        softcap=model.cfg.final_logit_softcapping,
    )
    return sums["ce_sum"], sums["correct_sum"], jnp.sum(weights)

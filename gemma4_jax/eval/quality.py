"""What quantisation costs: a model beside its float reference on held-out tokens, and what training gained over rounding alone."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import place_batch
from gemma4_jax.tables import percent, table

CHUNK = 128
"""Tokens whose logits, float32 [CHUNK, V], are there at a time, of both models: 2 x 128 MiB of Gemma's vocabulary."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """One model on the held-out tokens; `kl` is KL(reference || model) in nats a token, `agreement` the share of equal top-1."""

    name: str
    weights: str
    perplexity: float
    kl: float
    agreement: float
    exact_match: float | None = None
    rounded: str | None = None
    """Name of the model that only rounding gives, where this one was trained for the same grid."""


def divergence(model: Transformer, reference: Transformer, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{"perplexity", "kl", "agreement", "tokens"} of a model against its reference over all trained tokens.

    batches: as `perplexity.evaluate_loss` takes them; they end. Raises UserError where there is no token to count.
    """
    sums = [_sums(model, reference, dict(place_batch(batch))) for batch in batches]
    ce, kl, same, tokens = [math.fsum(column) for column in zip(*jax.device_get(sums), strict=True)] or [0.0] * 4
    if tokens <= 0:
        raise UserError(f"The {len(sums)} held-out batches have no trained token, so there is nothing to compare.")
    return {"perplexity": math.exp(ce / tokens), "kl": kl / tokens, "agreement": same / tokens, "tokens": tokens}


@jax.jit
def _sums(model: Transformer, reference: Transformer, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
    """Cross-entropy, KL, equal top-1 and tokens of a batch, summed; float32 scalars."""
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("media")
    hidden = [one.hidden(*inputs).reshape(-1, one.cfg.hidden_size) for one in (model, reference)]
    targets, weights = batch["targets"].reshape(-1), batch["loss_weights"].reshape(-1).astype(jnp.float32)
    rest = -len(targets) % CHUNK
    chunks = [jnp.pad(x, ((0, rest),) + ((0, 0),) * (x.ndim - 1)) for x in (*hidden, targets, weights)]
    chunks = [x.reshape(-1, CHUNK, *x.shape[1:]) for x in chunks]

    def add(total, part):
        ours, theirs, target, weight = part
        log_q, log_r = (jax.nn.log_softmax(one.logits(x)) for one, x in ((model, ours), (reference, theirs)))
        found = (
            -jnp.take_along_axis(log_q, target[:, None], 1)[:, 0],
            jnp.sum(jnp.exp(log_r) * (log_r - log_q), 1),
            (log_q.argmax(1) == log_r.argmax(1)).astype(jnp.float32),
            jnp.ones_like(weight),
        )
        return tuple(t + jnp.vdot(weight, x) for t, x in zip(total, found, strict=True)), None

    return jax.lax.scan(add, (jnp.float32(0),) * 4, tuple(chunks))[0]


def recovered(found: Sequence[Quality]) -> dict[str, float]:
    """Name of a trained model -> share of the perplexity lost by rounding alone that training won back; 1: all of it.

    The first of `found` is the float reference. Not there where rounding lost nothing.
    """
    of = {one.name: one.perplexity for one in found}
    base = found[0].perplexity
    pairs = [(one, of[one.rounded] - base) for one in found if one.rounded is not None]
    return {one.name: 1 - (one.perplexity - base) / lost for one, lost in pairs if lost > 0}


def report(found: Sequence[Quality]) -> str:
    """A line for each model, the float reference first."""
    won, base = recovered(found), found[0].perplexity
    rows = [
        (
            one.name,
            one.weights,
            f"{one.perplexity:.4f}",
            f"{one.perplexity - base:+.4f}",
            percent(won[one.name]) if one.name in won else None,
            f"{one.kl:.5f}",
            percent(one.agreement),
            None if one.exact_match is None else percent(one.exact_match),
        )
        for one in found
    ]
    return table(
        ("model", "weights", "perplexity", "lost", "won back", "KL to float", "top-1 of float", "exact match"), rows
    )


def plot(found: Sequence[Quality], path: str) -> None:
    """Bars of the perplexity that each model loses to the float reference, rounded and trained side by side; PNG, SVG or PDF.

    Raises ImportError without matplotlib (extra `notebooks`).
    """
    from matplotlib.figure import Figure

    base = found[0].perplexity
    trained = [one for one in found if one.rounded is not None]
    rounded = {one.name: one for one in found}
    figure = Figure(figsize=(1.5 + 1.6 * len(trained), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for shift, (label, shown) in enumerate(
        {
            "rounded after training": [rounded[one.rounded or ""] for one in trained],
            "trained with rounding (QAT)": trained,
        }.items()
    ):
        bars = axes.bar(
            [i + 0.4 * shift for i in range(len(shown))], [one.perplexity - base for one in shown], 0.38, label=label
        )
        axes.bar_label(bars, fmt=lambda lost: f"{round(lost, 3) + 0.0:.3f}")  # no "-0.000"
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.2 for i in range(len(trained))], [one.name for one in trained])
    axes.set_ylabel(f"perplexity above float ({base:.3f})")
    axes.legend(frameon=False)
    figure.savefig(path)

"""The scales of static activations, found once from the first batches and then frozen (`quant.activations`)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.model.parameters import arrays, with_arrays
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant.activations import scales
from gemma4_jax.sharding import place_batch

DECAY = 0.9
"""Of the moving average over batches; the first batch starts it."""
SMALLEST = 1e-12
"""A tensor that was always 0 still counts as calibrated."""


def calibrate(
    model: Transformer, batches: Iterator[Mapping[str, Any]], count: int, *, remat: str = "none"
) -> Transformer:
    """The model with its scales set from `count` batches: a moving average of absmax / 127, of a forward pass that rounds no
    activation. A model without static activations comes back as it is, and no batch is read.
    """
    names = scales(model)
    if not names:
        return model
    blank = {name: jnp.zeros_like(value) for name, value in names.items()}
    model = with_arrays(model, {**arrays(model), **blank})
    average = None
    for _ in range(count):
        parts = [_observed(model, place_batch(part), remat=remat) for part in micro_batches(next(batches))]
        seen = jax.tree.map(lambda *x: functools.reduce(jnp.maximum, x), *parts)
        average = seen if average is None else jax.tree.map(lambda a, x: DECAY * a + (1 - DECAY) * x, average, seen)
    assert average is not None
    found = {
        name: jax.device_put(jnp.maximum(value, SMALLEST), names[name].sharding) for name, value in average.items()
    }
    return with_arrays(model, {**arrays(model), **found})


def micro_batches(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The micro-batches of a batch whose media are cut for them (`data.media.MediaLayout`); else the batch."""
    media = batch.get("media")
    if media is None or media.soft_index.ndim == 2:
        return [batch]
    count, rows = len(media.soft_index), {name: x for name, x in batch.items() if name != "media"}
    return [
        {**{name: x[part::count] for name, x in rows.items()}, "media": jax.tree.map(lambda x, i=part: x[i], media)}
        for part in range(count)
    ]


@functools.partial(jax.jit, static_argnames="remat")
def _observed(model: Transformer, batch: Mapping[str, Any], *, remat: str) -> dict[str, jax.Array]:
    """absmax / 127 at every scale: what roundings give as its cotangent, whatever is differentiated.

    So nothing of the backward pass but that is computed: XLA drops the rest.
    """
    values = arrays(model)

    def run(free):
        hidden = with_arrays(model, {**values, **free}).hidden(
            batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("media"), remat=remat
        )
        return hidden.astype(jnp.float32).sum()

    return jax.grad(run)(scales(model))

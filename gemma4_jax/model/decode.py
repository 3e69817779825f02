"""Decoding: the same layers unrolled, reading and writing a cache.

A scan over layers with the cache as its input and output makes XLA hold a second cache (1.61 GB of temporaries for a
1.61 GB cache); unrolled layers with a donated tuple of caches need none.
"""

import jax
from flax import nnx

from gemma4_jax.config import LayerKind, ModelConfig
from gemma4_jax.model.embed import Embedding, PerLayerInputs
from gemma4_jax.model.kv import KV, Cache, producers, slot_of, write
from gemma4_jax.model.layer import Layer
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.transformer import Transformer


class Decoder(nnx.Module):
    """A Transformer with its layers apart; made once per model by `unroll`."""

    def __init__(self, model: Transformer, layers: list[Layer]):
        self.embed: Embedding = model.embed
        self.per_layer: PerLayerInputs | None = model.per_layer
        self.layers = nnx.List(layers)
        self.final_norm: RMSNorm = model.final_norm
        self.cfg: ModelConfig = model.cfg
        self.compute_dtype = model.compute_dtype

    places = Transformer.places
    embed_tokens = Transformer.embed_tokens
    logits = Transformer.logits

    def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of the next tokens, and the cache with them in it.

        Rows with position -1 are idle: nothing is written for them. T may not exceed the `ahead` the cache was made
        for, or a ring would lose keys that the step's first tokens still see.
        """
        slot: dict[LayerKind, jax.Array] = {
            kind: slot_of(positions_BT, where.shape[1]) for kind, where in cache.positions.items()
        }
        positions: dict[LayerKind, jax.Array] = {
            kind: write(where, slot[kind], positions_BT) for kind, where in cache.positions.items()
        }
        places = self.places(positions_BT)
        h, per_layer = self.embed_tokens(tokens_BT, self.per_layer)
        written: list[tuple[jax.Array, jax.Array]] = []
        source_layer = producers(self.cfg)
        for index, layer in enumerate(self.layers):
            kind = layer.attention.kind

            def keep(k, v, index=index, kind: LayerKind = kind):
                old_k, old_v = cache.layers[index]
                written.append((write(old_k, slot[kind], k), write(old_v, slot[kind], v)))
                return KV(*written[-1], positions[kind])

            shares = layer.attention.k is None
            source = KV(*written[source_layer[kind]], positions[kind]) if shares else keep
            h, _, _ = layer(h, None if per_layer is None else per_layer[index], places, source)
        return self.final_norm(h), Cache(tuple(written), positions)


def unroll(model: Transformer) -> Decoder:
    """The layers of both stacks as a list, each with its own slice of the stacked parameters."""
    layers = []
    for stack in (model.own, model.shared):
        if stack is None:
            continue
        for block in range(stack.plan.blocks):
            for i in range(stack.plan.sliding):
                layers.append(jax.tree.map(lambda x, b=block, i=i: x[b, i], stack.sliding))
            layers.append(jax.tree.map(lambda x, b=block: x[b], stack.full))
    return Decoder(model, layers)

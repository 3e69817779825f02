"""The drafter: four small layers that guess the model's next tokens one after the other from the model's own keys and values.

A step takes the newest token and the hidden state that came with it, concat(target's embedding of the token, hidden), through
`pre`, the layers and the final norm. Out come scores of the next token, and through `post` the hidden state of the next step. Its
layers have queries alone: sliding and full ones read what the target's last layer of that kind that owns keys and values has
stored. All steps of a draft stand at one position, that of the newest token the target gave; nothing is stored.
Source: transformers 5.23, models/gemma4_assistant/modeling_gemma4_assistant.py.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import LayerKind
from gemma4_jax.config_drafter import DrafterConfig
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.layer import Layer
from gemma4_jax.model.layouts import View
from gemma4_jax.model.linear import Buffer, Linear
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.transformer import places_of

FURTHER = 2
"""How much wider than the target's the window of a drafter is: it sees the last `sliding_window` + 1 stored keys, whose newest
stands one before the query. (transformers: distance at most `sliding_window` from the newest stored key.)"""


class Drafter(nnx.Module):
    """A drafter as a plain pytree; it computes in the dtype of what it is given.

    `centroids` and `token_ordering` [V] exist where only the best clusters are scored.
    """

    def __init__(self, cfg: DrafterConfig, *, rngs: nnx.Rngs, dtype: str = "float32"):
        text, role = cfg.text, "drafter"
        embed, backbone = {"embed": text.hidden_size}, cfg.backbone_hidden_size
        seen = dataclasses.replace(text, sliding_window=text.sliding_window + FURTHER)
        self.pre = Linear({"embed_and_hidden": 2 * backbone}, embed, role=role, stack={}, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            Layer(seen, kind, False, text.intermediate_size, stack={}, rngs=rngs, dtype=dtype)
            for kind in text.layer_kinds
        )
        self.final_norm = RMSNorm(embed, text.rms_norm_eps, stack={}, dtype=dtype)
        self.post = Linear(embed, {"backbone": backbone}, role=role, stack={}, rngs=rngs, dtype=dtype)
        width, std = text.hidden_size, text.hidden_size**-0.5
        self.embed = Embedding(text.vocab_size, embed, width, role=role, std=std, rngs=rngs, dtype=dtype)
        self.centroids: Linear | None = nnx.data(None)
        self.token_ordering: Buffer | None = nnx.data(None)
        if cfg.num_centroids:
            clusters = {"centroids": cfg.num_centroids}
            self.centroids = Linear(embed, clusters, role=role, stack={}, rngs=rngs, dtype=dtype)
            order = jnp.arange(text.vocab_size, dtype=jnp.int32)
            self.token_ordering = Buffer(order, dims=("vocab",), exact=True)
        self.cfg = cfg

    def step(
        self, embedded_BD: jax.Array, hidden_BD: jax.Array, position_B: jax.Array, views: Mapping[LayerKind, View]
    ) -> tuple[jax.Array, jax.Array]:
        """The state [B, own width] that `scores` reads, and the hidden state [B, D] of the next step.

        Args:
          embedded_BD: the target's embedding of the newest token, scaled.
          hidden_BD: what came with that token: the target's hidden state behind its final norm, one position before; or what the
            step before returned.
          position_B: int32, of the newest token the target gave; -1: idle.
          views: what the target's layers of each kind have stored up to the position before.
        """
        places = places_of(self.cfg.text, position_B[:, None])
        h = self.pre(jnp.concatenate([embedded_BD, hidden_BD], axis=-1))[:, None]
        for layer in self.layers:
            h, _, _ = layer(h, None, places, views[layer.attention.kind])
        h = self.final_norm(h)[:, 0]
        return h, self.post(h)

    def scores(self, state_BD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """float32 logits [B, C] of some tokens and their ids int32 [B, C]; None: every token, in order. No soft cap.

        With centroids C is the tokens of the best clusters (of E2B 32 of 2048, 4096 tokens); the others are never drafted.
        """
        if self.centroids is None or self.token_ordering is None:
            return self.embed.scores(state_BD), None
        table = self.embed.head(state_BD.dtype)
        clusters = self.token_ordering[...].reshape(self.cfg.num_centroids, -1)
        _, best = jax.lax.top_k(self.centroids(state_BD), self.cfg.centroid_intermediate_top_k)
        ids = clusters[best].reshape(state_BD.shape[0], -1)
        return jnp.einsum("BD,BCD->BC", state_BD, table[ids], preferred_element_type=jnp.float32), ids


def abstract_drafter(cfg: DrafterConfig, dtype: str = "float32") -> Drafter:
    """A drafter with ShapeDtypeStructs for arrays."""
    return jax.eval_shape(lambda: Drafter(cfg, rngs=nnx.Rngs(0), dtype=dtype))

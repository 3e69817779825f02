"""One decoder layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import LayerKind, ModelConfig
from gemma4_jax.model.attention import Attention, Keep, Places
from gemma4_jax.model.kv import KV
from gemma4_jax.model.layouts import View
from gemma4_jax.model.linear import Buffer, Dims, Linear, variable_dims
from gemma4_jax.model.mlp import MLP, gelu
from gemma4_jax.model.moe import ExpertLoad, Experts, Router
from gemma4_jax.model.norm import RMSNorm


class SparseBranch(nnx.Module):
    """The experts beside the dense feed-forward layer: norm(dense) + norm(experts(norm(residual)))."""

    def __init__(self, cfg: ModelConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed = {"embed": cfg.hidden_size}
        self.dense_norm = RMSNorm(embed, cfg.rms_norm_eps, stack=stack, dtype=dtype)
        self.pre_norm = RMSNorm(embed, cfg.rms_norm_eps, stack=stack, dtype=dtype)
        self.post_norm = RMSNorm(embed, cfg.rms_norm_eps, stack=stack, dtype=dtype)
        self.router = Router(cfg, stack=stack, rngs=rngs, dtype=dtype)
        self.experts = Experts(cfg, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(
        self, residual_BTD: jax.Array, dense_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, ExpertLoad]:
        """The sum of both branches, and how the tokens (not padding, position -1) spread over the experts."""
        routing = self.router(residual_BTD, positions_BT >= 0)
        sparse = self.experts(self.pre_norm(residual_BTD), routing.weights, routing.index)
        return self.dense_norm(dense_BTD) + self.post_norm(sparse), routing.load


class PerLayerBranch(nnx.Module):
    """norm(out(gelu(gate h) * per-layer input)): how E2B and E4B read their per-layer embeddings."""

    def __init__(self, cfg: ModelConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, narrow = {"embed": cfg.hidden_size}, {"per_layer": cfg.hidden_size_per_layer_input}
        self.gate = Linear(embed, narrow, role="per_layer", stack=stack, rngs=rngs, dtype=dtype)
        self.out = Linear(narrow, embed, role="per_layer", stack=stack, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(embed, cfg.rms_norm_eps, stack=stack, dtype=dtype)

    def __call__(self, h_BTD: jax.Array, per_layer_BTP: jax.Array) -> jax.Array:
        return self.norm(self.out(gelu(self.gate(h_BTD)) * per_layer_BTP))


class Layer(nnx.Module):
    """Attention, feed-forward (with experts beside it on 26B), per-layer input; each normed before and after.

    The whole residual stream is multiplied by `layer_scalar` at the end.
    """

    def __init__(
        self, cfg: ModelConfig, kind: LayerKind, owns_kv: bool, ffw: int, *, stack: Dims, rngs: nnx.Rngs, dtype: str
    ):
        def norm() -> RMSNorm:
            return RMSNorm({"embed": cfg.hidden_size}, cfg.rms_norm_eps, stack=stack, dtype=dtype)

        self.pre_attention_norm, self.post_attention_norm = norm(), norm()
        self.attention = Attention(cfg, kind, owns_kv, stack=stack, rngs=rngs, dtype=dtype)
        self.pre_ffw_norm, self.post_ffw_norm = norm(), norm()
        role = "ffw" if owns_kv else "ffw_shared"
        self.mlp = MLP(cfg.hidden_size, ffw, role=role, stack=stack, rngs=rngs, dtype=dtype)
        self.sparse = SparseBranch(cfg, stack=stack, rngs=rngs, dtype=dtype) if cfg.num_experts else None
        narrow = cfg.hidden_size_per_layer_input
        self.per_layer = PerLayerBranch(cfg, stack=stack, rngs=rngs, dtype=dtype) if narrow else None
        names, shape = variable_dims(stack)
        self.layer_scalar = Buffer(jnp.ones(shape, dtype), dims=names)

    def __call__(
        self, h_BTD: jax.Array, per_layer_BTP: jax.Array | None, places: Places, source: KV | View | Keep
    ) -> tuple[jax.Array, KV | View, ExpertLoad | None]:
        """The residual stream after this layer, the keys and values it looked at (`Attention.__call__`), its experts' load."""
        attended, kv = self.attention(self.pre_attention_norm(h_BTD), places, source)
        h = h_BTD + self.post_attention_norm(attended)
        ffw, load = self.mlp(self.pre_ffw_norm(h)), None
        if self.sparse is not None:
            ffw, load = self.sparse(h, ffw, places.positions)
        h = h + self.post_ffw_norm(ffw)
        if self.per_layer is not None:
            assert per_layer_BTP is not None
            h = h + self.per_layer(h, per_layer_BTP)
        return h * self.layer_scalar[...].astype(h.dtype), kv, load

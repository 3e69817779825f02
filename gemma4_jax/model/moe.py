"""The sparse half of a 26B-A4B layer: router and experts, dropless."""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.kernels.grouped_matmul import grouped_matmul
from gemma4_jax.model.linear import Dims, Linear, Weight, variable_dims
from gemma4_jax.model.mlp import gelu
from gemma4_jax.model.norm import rms_norm


class Router(nnx.Module):
    """Chooses `top_k` experts per token and their weights, in float32.

    softmax over all experts, top-k, renormalised to sum 1, then times `per_expert_scale` (so they need not sum to 1).
    Its input is the un-normed residual.
    """

    def __init__(self, cfg: ModelConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, experts = {"embed": cfg.hidden_size}, {"experts": cfg.num_experts}
        self.proj = Linear(embed, experts, role="router", stack=stack, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(stack, embed)
        self.scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        names, shape = variable_dims(stack, experts)
        self.per_expert_scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        self.top_k, self.eps = cfg.top_k_experts, cfg.rms_norm_eps

    def __call__(self, x_MD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """weights float32 and experts int32, both [M, top_k]."""
        x = rms_norm(x_MD.astype(jnp.float32), self.eps)
        x = x * (self.scale[...].astype(jnp.float32) * x.shape[-1] ** -0.5)[None]
        top, index = jax.lax.top_k(jax.nn.softmax(self.proj(x), axis=-1), self.top_k)
        weights = top / jnp.sum(top, axis=-1, keepdims=True)
        return weights * self.per_expert_scale[...].astype(jnp.float32)[index], index


class Experts(nnx.Module):
    """`num_experts` gated feed-forward layers; each token goes through its own few, none is dropped.

    gate and up lie side by side in one weight [E, D, 2, F]: one grouped matmul, and F stays shardable.
    """

    def __init__(self, cfg: ModelConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        stack = {**stack, "experts": cfg.num_experts}
        embed, wide = {"embed": cfg.hidden_size}, {"expert_ffw": cfg.moe_intermediate_size}
        gate_up = {"gate_up": 2, **wide}
        self.gate_up = Weight(embed, gate_up, role="experts", stack=stack, rngs=rngs, dtype=dtype)
        self.down = Weight(wide, embed, role="experts", stack=stack, rngs=rngs, dtype=dtype)
        self.num_experts = cfg.num_experts

    def __call__(self, x_MD: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
        """sum over the chosen experts of weight * expert(x); weights and index [M, top_k] as Router gives them."""
        tokens, top_k = index.shape
        order = jnp.argsort(index.reshape(-1), stable=True)
        group_sizes = jnp.bincount(index.reshape(-1), length=self.num_experts).astype(jnp.int32)
        rows = x_MD[order // top_k]
        gate_up = self.gate_up.rounded().astype(x_MD.dtype)
        gate_up = gate_up.reshape(gate_up.shape[0], gate_up.shape[1], -1)
        gate, up = jnp.split(grouped_matmul(rows, gate_up, group_sizes), 2, axis=-1)
        out = grouped_matmul(gelu(gate) * up, self.down.rounded().astype(x_MD.dtype), group_sizes)
        out = out * weights.reshape(-1)[order].astype(out.dtype)[:, None]
        # Undo the sort: row r of `out` belongs to choice order[r].
        back = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        return jnp.sum(back.reshape(tokens, top_k, -1), axis=1)

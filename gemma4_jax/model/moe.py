"""The sparse half of a 26B-A4B layer: router and experts, dropless."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.kernels.expert_routes import Gate
from gemma4_jax.kernels.experts import experts
from gemma4_jax.model.linear import Dims, Linear, Rounding, Weight, variable_dims
from gemma4_jax.model.mlp import gelu
from gemma4_jax.model.norm import rms_norm
from gemma4_jax.sharding import activation_spec, current_mesh


class ExpertLoad(NamedTuple):
    """How one layer's router spread the tokens of the whole batch, sums over them; float32 [E]. Layers may be stacked in front.

    rows: how often each expert was chosen. probability: the sum of what softmax gave it.
    """

    rows: jax.Array
    probability: jax.Array


class Routing(NamedTuple):
    """weights float32 and experts int32, both [B, T, k]; load."""

    weights: jax.Array
    index: jax.Array
    load: ExpertLoad


class Router(nnx.Module):
    """Chooses `top_k` experts per token and their weights, in float32.

    softmax over all experts, top-k, renormalised to sum 1, then times `per_expert_scale` (so they need not sum to 1).
    Its input is the un-normed residual.
    """

    def __init__(self, cfg: ModelConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        # Not "experts": that dim is cut over devices, and every device routes its own tokens to all experts.
        embed, experts = {"embed": cfg.hidden_size}, {"router_experts": cfg.num_experts}
        self.proj = Linear(embed, experts, role="router", stack=stack, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(stack, embed)
        self.scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        names, shape = variable_dims(stack, experts)
        self.per_expert_scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        self.top_k, self.eps = cfg.top_k_experts, cfg.rms_norm_eps

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array | None = None) -> Routing:
        """Routes every token; those that are not `valid` (padding) are left out of the load."""
        x = rms_norm(x_BTD.astype(jnp.float32), self.eps)
        x = x * (self.scale[...].astype(jnp.float32) * x.shape[-1] ** -0.5)[None, None]
        probability = jax.nn.softmax(self.proj(x), axis=-1)
        index = top_experts(jax.lax.stop_gradient(probability), self.top_k)
        # Picked by comparison, not by index: a gather's derivative is a scatter, slow on TPU and hard to partition.
        chosen = index[..., None] == jax.lax.iota(jnp.int32, probability.shape[-1])[None, None, None]

        def of_chosen(x_BTE: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(chosen, x_BTE[:, :, None], 0.0), axis=-1)

        top = of_chosen(probability)
        weights = top / jnp.sum(top, axis=-1, keepdims=True)
        weights = weights * of_chosen(self.per_expert_scale[...].astype(jnp.float32)[None, None])
        return Routing(weights, index, expert_load(probability, index, valid_BT))


def top_experts(probability_BTE: jax.Array, k: int) -> jax.Array:
    """The k likeliest experts of every token, int32 [B, T, k]; on a mesh each device's own tokens'."""

    def top(x: jax.Array) -> jax.Array:
        return jax.lax.top_k(x, k)[1]

    mesh = current_mesh()
    if mesh is None:
        return top(probability_BTE)
    # XLA gathers the whole batch for a top-k (seen on CPU; on TPU it does not).
    spec = activation_spec(mesh, ("batch", "length", None), probability_BTE.shape)
    return jax.shard_map(top, mesh=mesh, in_specs=spec, out_specs=spec)(probability_BTE)


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

    def __call__(self, x_BTD: jax.Array, weights_BTk: jax.Array, index_BTk: jax.Array) -> jax.Array:
        """sum over the chosen experts of weight * expert(x), [B, T, D]; weights and index as Router gives them."""
        gate = _gate
        if (rounding := self.gate_up.activations) is not None:
            # The same object every time: the gate is a static argument of `experts`.
            x_BTD, gate = rounding.enter(x_BTD, None), _rounded_gate(rounding)
        if self.gate_up.packed is not None and index_BTk.size < self.num_experts and current_mesh() is None:
            return self._few(x_BTD, weights_BTk, index_BTk, gate)
        gate_up, down = (weight.at(x_BTD).rounded().astype(x_BTD.dtype) for weight in (self.gate_up, self.down))
        with jax.named_scope("experts"):
            return experts(x_BTD, weights_BTk, index_BTk, gate_up, down, gate)

    def _few(self, x_BTD: jax.Array, weights_BTk: jax.Array, index_BTk: jax.Array, gate: Gate) -> jax.Array:
        """The same for fewer rows than experts, of codes: one row after the other, so that one expert is decoded at a time."""
        lead, count = x_BTD.shape[:-1], index_BTk.shape[-1]
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])

        def row(total_MD: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            expert, token = index_BTk.reshape(-1)[i], i // count
            gate_up, down = (_one(weight, expert).rounded().astype(x_MD.dtype) for weight in (self.gate_up, self.down))
            out_D = gate(x_MD[token] @ gate_up.reshape(gate_up.shape[0], -1)) @ down
            return total_MD.at[token].add(weights_BTk.reshape(-1)[i] * out_D.astype(jnp.float32)), None

        start = jnp.zeros(x_MD.shape, jnp.float32)
        total_MD, _ = jax.lax.scan(row, start, jnp.arange(index_BTk.size, dtype=jnp.int32))
        return total_MD.astype(x_BTD.dtype).reshape(*lead, -1)


def _one(weight: Weight, expert: jax.Array) -> Weight:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, expert, keepdims=False), weight)


def _gate(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gelu(gate) * up


@functools.cache
def _rounded_gate(rounding: Rounding) -> Gate:
    return lambda gate_up: rounding.enter(_gate(gate_up), None)


def expert_load(probability_BTE: jax.Array, index_BTk: jax.Array, valid_BT: jax.Array | None = None) -> ExpertLoad:
    """Sums over the valid tokens (all without `valid_BT`), on a mesh over those of all devices."""
    chosen = index_BTk[..., None] == jax.lax.iota(jnp.int32, probability_BTE.shape[-1])[None, None, None]
    rows = jnp.sum(chosen, axis=2, dtype=jnp.float32)
    if valid_BT is not None:
        rows, probability_BTE = (jnp.where(valid_BT[:, :, None], x, 0.0) for x in (rows, probability_BTE))
    return ExpertLoad(jnp.sum(rows, axis=(0, 1)), jnp.sum(probability_BTE, axis=(0, 1)))


def load_stats(load: ExpertLoad) -> dict[str, jax.Array]:
    """`max_load`: rows of the busiest expert over the mean; `unused`: share of experts without a row. Means over layers."""
    mean = jnp.mean(load.rows, axis=-1)
    busiest = jnp.max(load.rows, axis=-1) / jnp.maximum(mean, 1e-9)
    return {"max_load": jnp.mean(busiest), "unused": jnp.mean(load.rows == 0, dtype=jnp.float32)}


def balance_loss(load: ExpertLoad) -> jax.Array:
    """E * sum_e f_e p_e, mean over layers; 1 if even, E if one expert gets everything.

    f_e is the share of rows that went to expert e, p_e its mean probability (Switch Transformer, arXiv 2101.03961,
    equation 4, with f over all top-k choices as in GShard). The gradient goes through p_e.
    """
    share = load.rows / jnp.maximum(jnp.sum(load.rows, axis=-1, keepdims=True), 1.0)
    tokens = jnp.maximum(jnp.sum(load.probability, axis=-1, keepdims=True), 1e-9)
    probability = load.probability / jax.lax.stop_gradient(tokens)
    return jnp.mean(load.rows.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * probability, axis=-1))

"""A stack of equal blocks, scanned: inside a block first the sliding layers, then the full one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.config import LayerKind, ModelConfig, Stack
from gemma4_jax.kernels.sequence import ATTENTION
from gemma4_jax.model.attention import Places
from gemma4_jax.model.gathering import gathered
from gemma4_jax.model.kv import KV
from gemma4_jax.model.layer import Layer
from gemma4_jax.model.moe import ExpertLoad
from gemma4_jax.model.parameters import inside
from gemma4_jax.model.tally import Tally, linked, settled
from gemma4_jax.sharding import constrain

KeyValue = tuple[jax.Array, jax.Array]
SharedKV = dict[LayerKind, KeyValue]
Collect = Callable[[LayerKind, jax.Array, jax.Array], Any]

LAYER_INPUT = "layer_input"

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "save_attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "save_projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass finds, by name of the policy: everything; each layer's input; that input in the host's memory; the
input and what attention gave; the input and the outputs of the weights' products."""


class Kept(NamedTuple):
    """Of layers, stacked like their parameters: what `collect` made of k and v, and the load of the experts; or None."""

    collected: Any
    load: ExpertLoad | None


class LayerStack(nnx.Module):
    """`plan.blocks` blocks whose parameters are stacked: sliding layers [blocks, n, ...], full layers [blocks, ...].

    One block is traced however deep the model is. Remat, if any, is per layer.
    """

    def __init__(self, cfg: ModelConfig, plan: Stack, *, rngs: nnx.Rngs, dtype: str):
        blocks = {"blocks": plan.blocks}
        inner = {**blocks, "layers_in_block": plan.sliding}
        self.sliding = Layer(cfg, "sliding", plan.owns_kv, plan.ffw, stack=inner, rngs=rngs, dtype=dtype)
        self.full = Layer(cfg, "full", plan.owns_kv, plan.ffw, stack=blocks, rngs=rngs, dtype=dtype)
        self.plan = plan
        self.tally: Tally | None = nnx.data(None)
        """Where gradients add up over micro-batches (`tallied`); not a part of the model."""

    def __call__(
        self,
        h_BTD: jax.Array,
        per_layer_LBTP: jax.Array | None,
        places: Places,
        shared: SharedKV | None,
        *,
        remat: str,
        hand_on: bool = False,
        collect: Collect | None = None,
    ) -> tuple[jax.Array, SharedKV | None, tuple[Kept, Kept]]:
        """Runs the stack.

        Args:
          h_BTD: residual stream.
          per_layer_LBTP: per-layer inputs of this stack's layers, or None.
          places: positions, segments, rotations.
          shared: k, v by kind that this stack reads (where it owns none), else None.
          remat: a key of `REMAT`.
          hand_on: also return the last layers' k, v by kind. They travel in the scan's carry: taken from stacked
            outputs they cost 52 MB of temporaries against 10.4 MB (E2B structure, DESIGN.md decision 2).
          collect: what to keep of every layer's k, v (cache filling); stacked like the parameters.

        Returns:
          residual stream, k and v by kind (or None), what is kept of sliding and of full layers.
        """
        plan = self.plan

        def run(layer: Layer, h: jax.Array, per_layer: jax.Array | None):
            layer, h = gathered(layer, h.dtype), checkpoint_name(h, LAYER_INPUT)
            kind = layer.attention.kind
            if shared is not None:
                source = KV(*shared[kind], places.positions, places.segment_ids)
            else:
                source = lambda k, v: KV(k, v, places.positions, places.segment_ids)  # noqa: E731
            h, kv, load = layer(h, per_layer, places, source)
            assert isinstance(kv, KV)  # what `source` made; views are for decoding
            kept = collect(kind, kv.k, kv.v) if collect is not None else None
            return constrain(h, "batch", "length", None), ((kv.k, kv.v) if hand_on else None), Kept(kept, load)

        if remat != "none":
            run = jax.checkpoint(run, policy=REMAT[remat])

        def sliding_step(carry, xs):
            h, _, rows = carry
            layer, per_layer, index = xs
            if rows is not None:
                layer, rows = linked(layer, rows, index)
            h, handed, kept = run(layer, h, per_layer)
            return (h, handed, rows), kept

        def block_step(carry, xs):
            h, handed_sliding, _, rows = carry
            sliding, full, per_layer_sliding, per_layer_full, (sliding_index, full_index) = xs
            of_sliding, of_full = (None, None) if rows is None else rows
            (h, handed_sliding, of_sliding), kept_sliding = jax.lax.scan(
                sliding_step, (h, handed_sliding, of_sliding), (sliding, per_layer_sliding, sliding_index)
            )
            if of_full is not None:
                full, of_full = linked(full, of_full, full_index)
            h, handed_full, kept_full = run(full, h, per_layer_full)
            rows = None if rows is None else (of_sliding, of_full)
            return (h, handed_sliding, handed_full, rows), (kept_sliding, kept_full)

        sliding_inputs = full_inputs = None
        if per_layer_LBTP is not None:
            inputs = per_layer_LBTP.reshape(plan.blocks, plan.block_size, *per_layer_LBTP.shape[1:])
            sliding_inputs, full_inputs = inputs[:, :-1], inputs[:, -1]
        rows = None if self.tally is None else tuple(inside(kind, self.tally.zeros) for kind in ("sliding", "full"))
        start = (h_BTD, *self._nothing_yet(h_BTD, hand_on), rows)
        xs = (self.sliding, self.full, sliding_inputs, full_inputs, self._indices())
        (h, handed_sliding, handed_full, rows), kept = jax.lax.scan(block_step, start, xs)
        if self.tally is not None:
            h = settled(h, rows, tuple(inside(kind, self.tally.totals) for kind in ("sliding", "full")))
        if handed_sliding is None or handed_full is None:
            return h, None, kept
        return h, {"sliding": handed_sliding, "full": handed_full}, kept

    def _indices(self) -> tuple[Any, Any]:
        """Where in the stack each layer is: (block, place in it) of sliding ones, (block,) of full ones; (None, None) untallied."""
        if self.tally is None:
            return None, None
        shape = self.plan.blocks, self.plan.sliding
        block, place = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return (block, place), (block[:, 0],)

    def _nothing_yet(self, h_BTD: jax.Array, hand_on: bool) -> tuple[KeyValue | None, KeyValue | None]:
        """The k, v that the scan's carry starts with; every layer overwrites them unread."""
        if not hand_on:
            return None, None
        sliding, full = (
            constrain(jnp.zeros(layer.attention.kv_shape(h_BTD), h_BTD.dtype), "batch", "length", "kv_heads", None)
            for layer in (self.sliding, self.full)
        )
        return (sliding, sliding), (full, full)

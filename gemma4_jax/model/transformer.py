"""The whole text model: embedding, two scanned stacks, final norm, tied head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.attention import Places
from gemma4_jax.model.embed import Embedding, PerLayerInputs
from gemma4_jax.model.kv import Cache, empty_cache, slot_of, write
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.rope import Rotation, rotation
from gemma4_jax.model.stack import Collect, LayerStack


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap); the logits themselves without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class Transformer(nnx.Module):
    """A Gemma 4 text model as a plain pytree.

    Parameters are held in one dtype and computed with in `compute_dtype`; norm statistics, softmax, router, rotation
    angles and logits are float32 whatever that is.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype: str = "float32", compute_dtype: str | None = None):
        embed = {"embed": cfg.hidden_size}
        self.embed = Embedding(
            cfg.vocab_size,
            embed,
            cfg.hidden_size,
            role="embedding",
            std=cfg.hidden_size**-0.5,
            rngs=rngs,
            dtype=dtype,
        )
        self.per_layer = PerLayerInputs(cfg, rngs=rngs, dtype=dtype) if cfg.hidden_size_per_layer_input else None
        stacks = {plan.name: LayerStack(cfg, plan, rngs=rngs, dtype=dtype) for plan in cfg.stacks}
        self.own = stacks["own"]
        self.shared = stacks.get("shared")
        self.final_norm = RMSNorm(embed, cfg.rms_norm_eps, stack={}, dtype=dtype)
        self.cfg = cfg
        self.compute_dtype = compute_dtype or dtype

    def places(self, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> Places:
        """Positions, segments and the rotation of each layer kind."""
        turn: dict[LayerKind, Rotation] = {
            kind: rotation(positions_BT, self.cfg.head_size(kind), self.cfg.rope(kind)) for kind in KINDS
        }
        return Places(positions_BT, segment_ids_BT, turn)

    def embed_tokens(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream's start [B, T, D] and the per-layer inputs [L, B, T, P] (None without them)."""
        h = self.embed.lookup(tokens_BT, self.compute_dtype)
        return h, None if self.per_layer is None else self.per_layer(tokens_BT, h)

    def _run(self, tokens_BT, positions_BT, segment_ids_BT, remat: str, collect: Collect | None = None):
        """Final hidden states and what `collect` kept of the layers that own keys and values."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        places = self.places(positions_BT, segment_ids_BT)
        with jax.named_scope("embed"):
            h, per_layer = self.embed_tokens(tokens_BT)
        own = self.own.plan.layers
        first, rest = (None, None) if per_layer is None else (per_layer[:own], per_layer[own:])
        with jax.named_scope("own"):
            h, shared, kept = self.own(
                h, first, places, None, remat=remat, hand_on=self.shared is not None, collect=collect
            )
        if self.shared is not None:
            with jax.named_scope("shared"):
                h, _, _ = self.shared(h, rest, places, shared, remat=remat)
        return self.final_norm(h), kept

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """Hidden states after the final norm [B, T, D] in the compute dtype: what a chunked loss multiplies itself."""
        return self._run(tokens_BT, positions_BT, segment_ids_BT, remat)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 soft-capped logits [..., V] of hidden states [..., D]."""
        table = self.embed.rounded().astype(hidden.dtype)
        out = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
        return softcap(out, self.cfg.final_logit_softcapping)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        media: None = None,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """int32 tokens [B, T] -> float32 logits [B, T, V].

        Args:
          tokens: token ids.
          positions: int32 [B, T]; -1 marks padding, which nothing sees. Within a segment they grow by one a slot.
            None: 0, 1, 2, ...
          segment_ids: int32 [B, T]; tokens see only their own segment. None: one segment a row.
          media: images, video and audio, which this text model refuses.
          remat: recompute policy of the backward pass, a key of `model.stack.REMAT`.
        """
        if media is not None:
            raise UserError("This model reads text only, so media must be None; images and audio need a later version.")
        return self.logits(self.hidden(tokens, positions, segment_ids, remat=remat))

    def prefill(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, max_length: int, ahead: int = 1
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of prompts (padding anywhere, position -1) and the cache they leave behind.

        `max_length` bounds positions; `ahead` is how many tokens a later step may write at once.
        """
        cfg, batch = self.cfg, tokens_BT.shape[0]
        empty = empty_cache(cfg, batch, max_length, self.compute_dtype, ahead)
        slot = {kind: slot_of(positions_BT, where.shape[1]) for kind, where in empty.positions.items()}

        def fill(kind, k_BTKH, v_BTKH):
            shape = (batch, empty.positions[kind].shape[1], *k_BTKH.shape[2:])
            blank = jnp.zeros(shape, k_BTKH.dtype)
            return write(blank, slot[kind], k_BTKH), write(blank, slot[kind], v_BTKH)

        h, (sliding, full) = self._run(tokens_BT, positions_BT, None, "none", fill)
        plan = self.own.plan
        layers = []
        for block in range(plan.blocks):
            layers += [(sliding[0][block, i], sliding[1][block, i]) for i in range(plan.sliding)]
            layers.append((full[0][block], full[1][block]))
        positions: dict[LayerKind, jax.Array] = {
            kind: write(empty.positions[kind], slot[kind], positions_BT) for kind in KINDS
        }
        return h, Cache(tuple(layers), positions)


def init(cfg: ModelConfig, seed: int = 0, dtype: str = "float32", *, compute_dtype: str | None = None) -> Transformer:
    """A randomly initialised model; normal weights with variance 1/fan_in, norms and scalars 1."""
    # XLA's own generator: with JAX's default one, compiling the draws takes twice as long (12 s for a tiny model).
    return _random(jax.random.key(seed, impl="rbg"), cfg, dtype, compute_dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, cfg: ModelConfig, dtype: str, compute_dtype: str | None) -> Transformer:
    return Transformer(cfg, rngs=nnx.Rngs(params=key), dtype=dtype, compute_dtype=compute_dtype)


@functools.lru_cache(maxsize=16)
def abstract(cfg: ModelConfig, dtype: str = "float32", *, compute_dtype: str | None = None) -> Transformer:
    """The same tree with ShapeDtypeStructs for arrays: shapes of any size, no memory. Not to be modified."""
    return jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype, compute_dtype=compute_dtype))

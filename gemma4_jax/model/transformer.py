"""The whole text model: embedding, two scanned stacks, final norm, tied head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.kernels import vocabulary
from gemma4_jax.model.attention import Places
from gemma4_jax.model.embed import Embedding, PerLayerInputs
from gemma4_jax.model.gathering import gathered
from gemma4_jax.model.kv import Cache, empty_cache, slot_of, write
from gemma4_jax.model.moe import ExpertLoad
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.rope import Rotation, rotation
from gemma4_jax.model.stack import Collect, LayerStack
from gemma4_jax.sharding import constrain, current_mesh, parameter_shardings


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

    def embed_tokens(
        self, tokens_BT: jax.Array, per_layer: PerLayerInputs | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream's start [B, T, D] and what `per_layer` makes of it [L, B, T, P] (None without it)."""
        h = constrain(self.embed.lookup(tokens_BT, self.compute_dtype), "batch", "length", None)
        return h, None if per_layer is None else per_layer(tokens_BT, h)

    def _run(self, tokens_BT, positions_BT, segment_ids_BT, remat: str, collect: Collect | None = None):
        """Final hidden states, what `collect` kept of the layers that own keys and values, the experts' load by layer."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        places = self.places(positions_BT, segment_ids_BT)
        with jax.named_scope("embed"):
            h, per_layer = self.embed_tokens(tokens_BT, gathered(self.per_layer, self.compute_dtype))
        own = self.own.plan.layers
        first, rest = (None, None) if per_layer is None else (per_layer[:own], per_layer[own:])
        with jax.named_scope("own"):
            h, shared, (sliding, full) = self.own(
                h, first, places, None, remat=remat, hand_on=self.shared is not None, collect=collect
            )
        if self.shared is not None:
            with jax.named_scope("shared"):
                h, _, _ = self.shared(h, rest, places, shared, remat=remat)
        h = gathered(self.final_norm, self.compute_dtype)(h)
        return h, (sliding.collected, full.collected), _load(sliding.load, full.load)

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

    def hidden_and_load(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, *, remat: str = "none"
    ) -> tuple[jax.Array, ExpertLoad | None]:
        """`hidden`, and how the routers spread the tokens: [L, E]; None without experts."""
        h, _, load = self._run(tokens_BT, positions_BT, segment_ids_BT, remat)
        return h, load

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 soft-capped logits [..., V] of hidden states [..., D]."""
        table = self.embed.head(hidden.dtype)
        if current_mesh() is None:
            out = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
        else:
            out = vocabulary.logits(hidden, table)
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

        h, (sliding, full), _ = self._run(tokens_BT, positions_BT, None, "none", fill)
        plan = self.own.plan
        layers = []
        for block in range(plan.blocks):
            layers += [(sliding[0][block, i], sliding[1][block, i]) for i in range(plan.sliding)]
            layers.append((full[0][block], full[1][block]))
        positions: dict[LayerKind, jax.Array] = {
            kind: write(empty.positions[kind], slot[kind], positions_BT) for kind in KINDS
        }
        return h, Cache(tuple(layers), positions)


def _load(sliding: ExpertLoad | None, full: ExpertLoad | None) -> ExpertLoad | None:
    """The loads of sliding layers [blocks, n, E] and full layers [blocks, E] as one [L, E]."""
    if sliding is None or full is None:
        return None
    both = (jnp.concatenate([x, y[:, None]], axis=1) for x, y in zip(sliding, full, strict=True))
    return ExpertLoad(*(x.reshape(-1, x.shape[-1]) for x in both))


def init(
    cfg: ModelConfig,
    seed: int = 0,
    dtype: str = "float32",
    *,
    compute_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
    """A randomly initialised model; normal weights with variance 1/fan_in, norms and scalars 1.

    On a mesh each device draws its own share: no parameter ever exists whole.
    """
    # XLA's own generator: with JAX's default one, compiling the draws takes twice as long (12 s for a tiny model).
    key = jax.random.key(seed, impl="rbg")
    if mesh is None:
        return _random(key, cfg, dtype, compute_dtype)
    shardings = map_arrays(parameter_shardings(mesh), abstract(cfg, dtype, compute_dtype=compute_dtype))
    return jax.jit(_draw, static_argnums=(1, 2, 3), out_shardings=shardings)(key, cfg, dtype, compute_dtype)


def _draw(key: jax.Array, cfg: ModelConfig, dtype: str, compute_dtype: str | None) -> Transformer:
    return Transformer(cfg, rngs=nnx.Rngs(params=key), dtype=dtype, compute_dtype=compute_dtype)


_random = jax.jit(_draw, static_argnums=(1, 2, 3))


@functools.lru_cache(maxsize=16)
def abstract(cfg: ModelConfig, dtype: str = "float32", *, compute_dtype: str | None = None) -> Transformer:
    """The same tree with ShapeDtypeStructs for arrays: shapes of any size, no memory. Not to be modified."""
    return jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype, compute_dtype=compute_dtype))

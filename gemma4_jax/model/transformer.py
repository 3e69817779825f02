"""The whole model: towers where it has them, embedding, two scanned stacks, final norm, tied head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import KINDS, LayerKind, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.attention import Places
from gemma4_jax.model.audio import AudioTower
from gemma4_jax.model.embed import Embedding, PerLayerInputs
from gemma4_jax.model.gathering import gathered
from gemma4_jax.model.kv import Cache, empty_cache, slot_of, write, write_positions
from gemma4_jax.model.layouts import CacheFormat, blank, encoded
from gemma4_jax.model.moe import ExpertLoad
from gemma4_jax.model.multimodal import Media, Projector, SoftTokens, last_seen, merge, text_ids
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.rope import Rotation, rotation
from gemma4_jax.model.stack import Collect, LayerStack
from gemma4_jax.model.vision import VisionTower
from gemma4_jax.sharding import constrain, parameter_shardings


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap); the logits themselves without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def places_of(
    cfg: ModelConfig,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    soft: SoftTokens | None = None,
) -> Places:
    """Positions, segments, the rotation of each layer kind, and how far the tokens of images see."""
    turn: dict[LayerKind, Rotation] = {
        kind: rotation(positions_BT, cfg.head_size(kind), cfg.rope(kind)) for kind in KINDS
    }
    if soft is None or not soft.longest_image or not cfg.sees_ahead:
        return Places(positions_BT, segment_ids_BT, turn)
    return Places(positions_BT, segment_ids_BT, turn, last_seen(soft.block_ids, positions_BT), soft.longest_image)


class Transformer(nnx.Module):
    """A Gemma 4 model as a plain pytree: the text model, and `vision` and `audio` with their projections, or None.

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
        eyes, ears = cfg.vision, cfg.audio
        self.vision = VisionTower(eyes, rngs=rngs, dtype=dtype) if eyes else None
        self.vision_projection = (
            Projector({"vision_embed": eyes.hidden_size}, embed, eyes.rms_norm_eps, rngs=rngs, dtype=dtype)
            if eyes
            else None
        )
        self.audio = AudioTower(ears, rngs=rngs, dtype=dtype) if ears else None
        self.audio_projection = (
            Projector({"audio_out": ears.output_proj_dims}, embed, ears.rms_norm_eps, rngs=rngs, dtype=dtype)
            if ears
            else None
        )
        self.cfg = cfg
        self.compute_dtype = compute_dtype or dtype

    def places(
        self, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None, soft: SoftTokens | None = None
    ) -> Places:
        """Positions, segments, the rotation of each layer kind, and how far the tokens of images see."""
        return places_of(self.cfg, positions_BT, segment_ids_BT, soft)

    def soft_tokens(self, media: Media, *, remat: str = "none") -> SoftTokens:
        """What the towers make of media, projected to the text's width: [M, D] in the compute dtype.

        Raises UserError where the model has no tower for them.
        """
        found = []
        if media.images:
            if self.vision is None or self.vision_projection is None:
                raise UserError("This model has no vision tower, so it takes no images; load it without text_only.")
            project = gathered(self.vision_projection, self.compute_dtype)
            with jax.named_scope("vision"):
                found += [project(self.vision(group, self.compute_dtype, remat=remat)) for group in media.images]
        if media.sounds is not None:
            if self.audio is None or self.audio_projection is None:
                raise UserError(
                    "This model has no audio tower, so it takes no sounds: only E2B and E4B hear, and only without text_only."
                )
            with jax.named_scope("audio"):
                heard = self.audio(media.sounds, self.compute_dtype, remat=remat)
                found.append(gathered(self.audio_projection, self.compute_dtype)(heard))
        if not found:
            raise ValueError("media has neither images nor sounds; pass None for text")
        values = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in found])
        return SoftTokens(constrain(values, None, None), media.soft_index, media.block_ids, media.longest_image)

    def embed_tokens(
        self, tokens_BT: jax.Array, per_layer: PerLayerInputs | None, soft: SoftTokens | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream's start [B, T, D] and what `per_layer` makes of it [L, B, T, P] (None without it).

        Where soft tokens stand, the per-layer inputs read the padding's row of their table, and the soft token itself.
        """
        if soft is not None:
            tokens_BT = text_ids(tokens_BT, soft, self.cfg.pad_token_id)
        h = constrain(self.embed.lookup(tokens_BT, self.compute_dtype), "batch", "length", None)
        if soft is not None:
            h = constrain(merge(h, soft), "batch", "length", None)
        return h, None if per_layer is None else per_layer(tokens_BT, h)

    def _run(
        self,
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        remat: str,
        collect: Collect | None = None,
        media: Media | SoftTokens | None = None,
    ):
        """Final hidden states, what `collect` kept of the layers that own keys and values, the experts' load by layer."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        soft = self.soft_tokens(media, remat=remat) if isinstance(media, Media) else media
        places = self.places(positions_BT, segment_ids_BT, soft)
        with jax.named_scope("embed"):
            h, per_layer = self.embed_tokens(tokens_BT, gathered(self.per_layer, self.compute_dtype), soft)
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
        media: Media | SoftTokens | None = None,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """Hidden states after the final norm [B, T, D] in the compute dtype: what a chunked loss multiplies itself."""
        return self._run(tokens_BT, positions_BT, segment_ids_BT, remat, media=media)[0]

    def hidden_and_load(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        media: Media | SoftTokens | None = None,
        *,
        remat: str = "none",
    ) -> tuple[jax.Array, ExpertLoad | None]:
        """`hidden`, and how the routers spread the tokens: [L, E]; None without experts."""
        h, _, load = self._run(tokens_BT, positions_BT, segment_ids_BT, remat, media=media)
        return h, load

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 soft-capped logits [..., V] of hidden states [..., D]."""
        return softcap(self.embed.scores(hidden), self.cfg.final_logit_softcapping)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        media: Media | SoftTokens | None = None,
        *,
        remat: str = "none",
    ) -> jax.Array:
        """int32 tokens [B, T] -> float32 logits [B, T, V].

        Args:
          tokens: token ids.
          positions: int32 [B, T]; -1 marks padding, which nothing sees. Within a segment they grow by one a slot.
            None: 0, 1, 2, ...
          segment_ids: int32 [B, T]; tokens see only their own segment. None: one segment a row.
          media: images, video frames and audio and where they stand, or what the towers made of them; None: text.
          remat: recompute policy of the backward pass, a key of `model.stack.REMAT`.
        """
        return self.logits(self.hidden(tokens, positions, segment_ids, media, remat=remat))

    def prefill(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        max_length: int,
        ahead: int = 1,
        cache_format: CacheFormat = CacheFormat(),  # noqa: B008
        media: Media | SoftTokens | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of prompts (padding anywhere, position -1) and the cache they leave behind.

        `max_length` bounds positions; `ahead` is how many tokens a later step may write at once. Whole prompts at once, with
        stacked weights; `infer` reads them in chunks with unrolled ones.
        """
        cfg, batch = self.cfg, tokens_BT.shape[0]
        empty = empty_cache(cfg, batch, max_length, self.compute_dtype, ahead, cache_format)
        slot = {kind: slot_of(positions_BT, where.shape[1]) for kind, where in empty.positions.items()}

        def fill(kind, k_BTKH, v_BTKH):
            parts = blank(cfg, kind, cache_format, batch, empty.positions[kind].shape[1], k_BTKH.dtype)
            return write(parts, slot[kind], encoded(cfg, kind, cache_format, k_BTKH, v_BTKH))

        h, (sliding, full), _ = self._run(tokens_BT, positions_BT, None, "none", fill, media)
        plan = self.own.plan
        layers = []
        for block in range(plan.blocks):
            layers += [jax.tree.map(lambda x, b=block, i=i: x[b, i], sliding) for i in range(plan.sliding)]
            layers.append(jax.tree.map(lambda x, b=block: x[b], full))
        positions: dict[LayerKind, jax.Array] = {
            kind: write_positions(empty.positions[kind], slot[kind], positions_BT) for kind in KINDS
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

"""The vision tower: patches of an image to soft tokens.

Patches lie cell by cell, the C = 3 x 3 patches that become one soft token next to each other, so pooling is a mean over an
axis. Attention does not care about the order: where a patch stands in its image is in its positions. Letters: N images, S soft
tokens, C patches of a cell, P numbers of a patch, T = S * C patches, D width of the tower, H head dim. Source: transformers
5.23, `Gemma4VisionModel`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.config import Rope
from gemma4_jax.config_media import VisionConfig
from gemma4_jax.kernels.blockwise import Labels, blockwise_attention
from gemma4_jax.kernels.chunked import full_spans
from gemma4_jax.model.clipped import ClippedLinear
from gemma4_jax.model.gathering import gathered
from gemma4_jax.model.linear import Buffer, Dims, Linear, variable_dims
from gemma4_jax.model.mlp import gelu
from gemma4_jax.model.multimodal import Patches
from gemma4_jax.model.norm import RMSNorm, rms_norm
from gemma4_jax.model.rope import Rotation, rotate, rotation
from gemma4_jax.model.stack import LAYER_INPUT, REMAT
from gemma4_jax.sharding import constrain, gather

ROLE = "vision"

CHUNK = 256
"""Queries at a time: with 1120 soft tokens the scores of a head are [256, 10080], not [10080, 10080]."""


class VisionAttention(nnx.Module):
    """Every patch sees every patch of its image; RMS norms on q and k (scaled) and v, softmax scale 1, rotation in 2-D."""

    def __init__(self, cfg: VisionConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, head = {"vision_embed": cfg.hidden_size}, {"vision_head_dim": cfg.head_dim}
        heads = {"vision_heads": cfg.num_attention_heads, **head}

        def linear(inputs: Dims, outputs: Dims) -> ClippedLinear:
            return ClippedLinear(
                inputs, outputs, clipped=cfg.use_clipped_linears, role=ROLE, stack=stack, rngs=rngs, dtype=dtype
            )

        self.q, self.k, self.v, self.o = (
            linear(embed, heads),
            linear(embed, heads),
            linear(embed, heads),
            linear(heads, embed),
        )
        self.q_norm = RMSNorm(head, cfg.rms_norm_eps, stack=stack, dtype=dtype)
        self.k_norm = RMSNorm(head, cfg.rms_norm_eps, stack=stack, dtype=dtype)
        self.eps = cfg.rms_norm_eps

    def __call__(self, x_NTD: jax.Array, labels: Labels, turns: tuple[Rotation, Rotation]) -> jax.Array:
        q, k = _turned(self.q_norm(self.q(x_NTD)), turns), _turned(self.k_norm(self.k(x_NTD)), turns)
        v = rms_norm(self.v(x_NTD), self.eps)
        length = x_NTD.shape[1]
        out = blockwise_attention(q, k, v, labels, spans=full_spans(length, length, min(CHUNK, length)), window=None)
        return self.o(out)


class VisionLayer(nnx.Module):
    """Attention and feed-forward, each normed before and after."""

    def __init__(self, cfg: VisionConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, wide = {"vision_embed": cfg.hidden_size}, {"vision_ffw": cfg.intermediate_size}

        def norm() -> RMSNorm:
            return RMSNorm(embed, cfg.rms_norm_eps, stack=stack, dtype=dtype)

        def linear(inputs: Dims, outputs: Dims) -> ClippedLinear:
            return ClippedLinear(
                inputs, outputs, clipped=cfg.use_clipped_linears, role=ROLE, stack=stack, rngs=rngs, dtype=dtype
            )

        self.pre_attention_norm, self.post_attention_norm = norm(), norm()
        self.attention = VisionAttention(cfg, stack=stack, rngs=rngs, dtype=dtype)
        self.pre_ffw_norm, self.post_ffw_norm = norm(), norm()
        self.gate, self.up, self.down = linear(embed, wide), linear(embed, wide), linear(wide, embed)

    def __call__(self, h_NTD: jax.Array, labels: Labels, turns: tuple[Rotation, Rotation]) -> jax.Array:
        h = h_NTD + self.post_attention_norm(self.attention(self.pre_attention_norm(h_NTD), labels, turns))
        x = self.pre_ffw_norm(h)
        return h + self.post_ffw_norm(self.down(gelu(self.gate(x)) * self.up(x)))


class VisionTower(nnx.Module):
    """Images to soft tokens of the tower's own width, before the projection to the text's."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        embed = {"vision_embed": cfg.hidden_size}
        self.patch = Linear({"patch": cfg.patch_values}, embed, role=ROLE, stack={}, rngs=rngs, dtype=dtype)
        names, shape = variable_dims({"axes": 2, "vision_positions": cfg.position_embedding_size}, embed)
        table = jax.random.normal(rngs.params(), shape, dtype) * cfg.hidden_size**-0.5
        self.positions = nnx.Param(table, dims=names)
        self.layers = VisionLayer(cfg, stack={"tower_layers": cfg.num_hidden_layers}, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(embed)
        self.std_bias = Buffer(jnp.zeros(shape, dtype), dims=names) if cfg.standardize else None
        self.std_scale = Buffer(jnp.ones(shape, dtype), dims=names) if cfg.standardize else None
        self.cfg = cfg

    def __call__(self, images: Patches, dtype: jax.typing.DTypeLike, *, remat: str = "none") -> jax.Array:
        """[N, S, D] in `dtype`; what stands in the place of missing soft tokens means nothing."""
        count, size, cell, values = images.pixels.shape
        positions = images.positions.reshape(count, size * cell, 2)
        real = positions[..., 0] >= 0
        h = gathered(self.patch, dtype)(_scaled(images.pixels.reshape(count, size * cell, values), dtype))
        h = h + self._position_embedding(positions, real, dtype)
        # All patches of an image at one position: nothing is after anything, and padding (-1) is seen by none.
        place = jnp.where(real, 0, -1)
        labels = Labels(place, place, None, None)
        half, rope = self.cfg.head_dim // 2, Rope(self.cfg.rope_theta)
        turns = rotation(positions[..., 0], half, rope), rotation(positions[..., 1], half, rope)

        def run(layer: VisionLayer, h: jax.Array) -> jax.Array:
            layer, h = gathered(layer, h.dtype), checkpoint_name(h, LAYER_INPUT)
            return constrain(layer(h, labels, turns), "media", None, None)

        if remat != "none":
            run = jax.checkpoint(run, policy=REMAT[remat])
        h, _ = jax.lax.scan(lambda h, layer: (run(layer, h), None), constrain(h, "media", None, None), self.layers)
        return self._pooled(jnp.where(real[..., None], h, jnp.zeros((), h.dtype)).reshape(count, size, cell, -1))

    def _position_embedding(
        self, positions_NT2: jax.Array, real_NT: jax.Array, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """Row x of the first table plus row y of the second; 0 for padding."""
        table = gather(self.positions[...].astype(dtype), self.positions.dims)
        x, y = (table[axis][jnp.maximum(positions_NT2[..., axis], 0)] for axis in range(2))
        return jnp.where(real_NT[..., None], x + y, jnp.zeros((), dtype))

    def _pooled(self, h_NSCD: jax.Array) -> jax.Array:
        """The mean of each cell times sqrt(D), then (v - bias) * scale where the model has these; in float32.

        In bfloat16 the subtraction would cancel most of the digits.
        """
        pooled = jnp.mean(h_NSCD.astype(jnp.float32), axis=2).astype(h_NSCD.dtype).astype(jnp.float32)
        pooled = pooled * self.cfg.hidden_size**0.5
        if self.std_bias is not None and self.std_scale is not None:
            bias, scale = (x[...].astype(jnp.float32)[None, None] for x in (self.std_bias, self.std_scale))
            pooled = (pooled - bias) * scale
        return pooled.astype(h_NSCD.dtype)


def _scaled(pixels: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Bytes as numbers from -1 to 1; there is no mean and no deviation."""
    return (2.0 * (pixels.astype(jnp.float32) / 255.0 - 0.5)).astype(dtype)


def _turned(x_NTHd: jax.Array, turns: tuple[Rotation, Rotation]) -> jax.Array:
    """The first half of each head rotated by the column, the second by the row, each half within itself."""
    halves = jnp.split(x_NTHd, 2, axis=-1)
    return jnp.concatenate([rotate(half, turn) for half, turn in zip(halves, turns, strict=True)], axis=-1)

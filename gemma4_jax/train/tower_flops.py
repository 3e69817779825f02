"""Model FLOPs of the pictures and sounds of a step: what towers and projectors make of what is there, padding left out.

Counted like those of text (`train.throughput`): 2 per number of a matrix that something is multiplied with, and the products of
attention for the pairs that see each other. A tower of which anything is trained counts three forward passes, a frozen one its
forward pass alone, since no gradient enters it; a projector one pass more for each gradient that is made, its weight's and its
inputs'. The decoder's work on soft tokens is that on any token.

Letters as in `model.vision` and `model.audio`.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from gemma4_jax.config import ModelConfig
from gemma4_jax.config_media import AudioConfig, VisionConfig
from gemma4_jax.media.sounds import BINS
from gemma4_jax.model.multimodal import Media, Patches, Sounds


def media_flops(cfg: ModelConfig, media: Media, trained: Iterable[str] = ()) -> jax.Array:
    """float32 scalar, of the real pictures and sounds of `media` (one micro-batch, all devices).

    `trained`: names of the parameters that move; none: a forward pass, as of a teacher.
    """
    moved = {name.partition(".")[0] for name in trained}
    total = jnp.zeros((), jnp.float32)
    if cfg.vision is not None:
        for group in media.images:
            tower, soft_tokens = picture_flops(cfg.vision, group)
            projector = 2.0 * soft_tokens * cfg.vision.hidden_size * cfg.hidden_size
            total += _passes(tower, projector, "vision", moved)
    if cfg.audio is not None and media.sounds is not None:
        tower, soft_tokens = sound_flops(cfg.audio, media.sounds)
        projector = 2.0 * soft_tokens * cfg.audio.output_proj_dims * cfg.hidden_size
        total += _passes(tower, projector, "audio", moved)
    return total


def picture_flops(cfg: VisionConfig, group: Patches) -> tuple[jax.Array, jax.Array]:
    """(forward FLOPs of the tower, soft tokens) of the real patches: each of them sees all of its picture."""
    patches_N = jnp.sum(group.positions[..., 0] >= 0, axis=(-2, -1)).astype(jnp.float32)
    inner = cfg.num_attention_heads * cfg.head_dim
    layer = cfg.hidden_size * (4 * inner + 3 * cfg.intermediate_size)
    patch = 2.0 * (cfg.patch_values * cfg.hidden_size + cfg.num_hidden_layers * layer)
    pair = 4.0 * cfg.num_hidden_layers * inner  # q k, weights v
    patches = jnp.sum(patches_N)
    return patch * patches + pair * jnp.sum(jnp.square(patches_N)), patches / cfg.cell_patches


def sound_flops(cfg: AudioConfig, sounds: Sounds) -> tuple[jax.Array, jax.Array]:
    """(forward FLOPs of the tower, soft tokens) of the real frames.

    A token sees itself and those before it in a window of W; each pair costs q k, q relative and weights v.
    """
    frames_A = jnp.sum(sounds.valid, axis=-1).astype(jnp.float32)
    halves_A = jnp.ceil(frames_A / 2)
    tokens_A = jnp.ceil(halves_A / 2)
    width, layers, window = cfg.hidden_size, cfg.num_hidden_layers, cfg.attention_chunk_size
    first, second = cfg.subsampling_conv_channels
    half = 2.0 * (BINS // 2) * 9 * first  # kernels of 3 x 3
    layer = (16 + 4 + 3) * width**2  # two feed-forwards of 4 D, attention, convolution's in (2 D) and out
    subsampled = (BINS // 4) * (9 * first * second + second * width)
    token = 2.0 * (subsampled + layers * layer + width * cfg.output_proj_dims)
    inside_A = jnp.minimum(tokens_A, window)
    pairs = jnp.sum(inside_A * (inside_A + 1) / 2 + (tokens_A - inside_A) * window)
    distances = 2.0 * layers * (window + 1) * width**2  # projected once for all clips
    tokens = jnp.sum(tokens_A)
    flops = half * jnp.sum(halves_A) + token * tokens + 6.0 * layers * width * pairs
    return flops + jnp.where(tokens > 0, distances, 0.0), tokens


def _passes(tower: jax.Array, projector: jax.Array, name: str, moved: set[str]) -> jax.Array:
    looks = name in moved
    return tower * (3 if looks else 1) + projector * (1 + looks + (f"{name}_projection" in moved))

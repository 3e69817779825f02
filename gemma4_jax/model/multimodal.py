"""Images, video frames and audio on their way into the text: arrays, soft tokens, and who sees whom in an image.

Everything has static shapes, padded to a few sizes (`gemma4_jax.media.batch`), so that other numbers of images need no other
program. A video is its frames, each an image of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.model.linear import Dims, Linear
from gemma4_jax.model.norm import rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """N images of at most S soft tokens, each the mean of C patches (`VisionConfig.cell_patches`) of P numbers.

    pixels: uint8 [N, S, C, P], a patch by rows, columns, colours.
    positions: int32 [N, S, C, 2], (column, row) of each patch in its image; -1 where there is none.
    """

    pixels: jax.Array
    positions: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sounds:
    """A clips of at most F frames of 10 ms.

    mel: float32 [A, F, 128], log-mel spectrogram, 0 where not valid.
    valid: bool [A, F], true up to the end of the clip.
    """

    mel: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
    """What the towers look at, and where it goes in tokens [B, T].

    Soft tokens are numbered through all groups: N * S of each group of images in order, then A * soft_frames(F) of the audio,
    those of padding included.

    soft_index: int32 [B, T], the number of the soft token that stands here; -1 for text.
    block_ids: int32 [B, T], the same positive number for the soft tokens of one image or frame, 0 for everything else.
    images: groups of images, one for each size S.
    sounds: audio, or None.
    """

    soft_index: jax.Array
    block_ids: jax.Array
    images: tuple[Patches, ...] = ()
    sounds: Sounds | None = None

    @property
    def longest_image(self) -> int:
        """Most soft tokens that an image here can have."""
        return max((group.positions.shape[-3] for group in self.images), default=0)

    def with_dims(self, fn: Callable[[Any, tuple[str | None, ...]], Any]) -> "Media":
        """The same with fn(array, names of its dims) in place of each array, names as `sharding.ACTIVATIONS` has them.

        Media of several micro-batches have one more dim in front, whole on each device.
        """

        def apply(x: Any, *dims: str | None) -> Any:
            return fn(x, (None,) * (x.ndim - len(dims)) + dims)

        lead = self.soft_index.ndim - 2

        def of_each(x: Any) -> Any:
            return apply(x, "media", *(None,) * (x.ndim - lead - 1))

        where = (apply(x, "batch", "length") for x in (self.soft_index, self.block_ids))
        return Media(*where, *jax.tree.map(of_each, (self.images, self.sounds)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftTokens:
    """Media that the towers have looked at (`Transformer.soft_tokens`): what a prompt in several chunks passes along.

    values: [M, D]; soft_index, block_ids, longest_image as in Media.
    """

    values: jax.Array
    soft_index: jax.Array
    block_ids: jax.Array
    longest_image: int = dataclasses.field(metadata={"static": True})


class Projector(nnx.Module):
    """From a tower's width to the text's: RMS norm without a scale, then a linear map."""

    def __init__(self, inputs: Dims, outputs: Dims, eps: float, *, rngs: nnx.Rngs, dtype: str):
        self.linear = Linear(inputs, outputs, role="projector", stack={}, rngs=rngs, dtype=dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(rms_norm(x, self.eps))


def soft_frames(frames: int) -> int:
    """Soft tokens of so many audio frames: two convolutions halve them, rounding up."""
    return ((frames + 1) // 2 + 1) // 2


def text_ids(tokens_BT: jax.Array, soft: SoftTokens, pad: int) -> jax.Array:
    """Token ids with the padding's where soft tokens stand: whose rows the tables are read at, not the placeholders'."""
    return jnp.where(soft.soft_index >= 0, jnp.int32(pad), tokens_BT)


def merge(embedded_BTD: jax.Array, soft: SoftTokens) -> jax.Array:
    """Embeddings with the soft tokens in their places, in the dtype of the embeddings.

    They are not scaled: this comes after the embedding's own scale.
    """
    at = soft.soft_index
    chosen = soft.values.astype(embedded_BTD.dtype)[jnp.maximum(at, 0)]
    return jnp.where((at >= 0)[..., None], chosen, embedded_BTD)


def last_seen(block_ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The last position each token sees where images see themselves whole, int32 [B, T]: the end of its image, or its own.

    A block is a run of slots with one positive id. With it, "causal or in the same image" is "not after this position", because
    nothing else stands between a token and the end of its image.
    """
    length = block_ids_BT.shape[1]
    slot = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], block_ids_BT.shape)
    following = jnp.pad(block_ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where((block_ids_BT != following) | (block_ids_BT <= 0), slot, length)
    end = jax.lax.cummin(ends, axis=1, reverse=True)
    return positions_BT + end - slot

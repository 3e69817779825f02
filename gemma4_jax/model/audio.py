"""The audio tower of E2B and E4B: a conformer with chunked local attention, log-mel frames to soft tokens of 40 ms.

Letters: A clips, F frames of 10 ms, M mel bins, T = F / 4 soft tokens, D width of the tower, N heads, H head dim, W tokens of a
chunk, C channels. Source: transformers 5.23, `Gemma4AudioModel`; the attention is that of Universal Speech Models (arXiv
2303.01037) with relative positions after Transformer-XL (arXiv 1901.02860).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.config_media import AudioConfig
from gemma4_jax.model.clipped import ClippedLinear
from gemma4_jax.model.gathering import gathered
from gemma4_jax.model.linear import Dims, Linear, Weight, variable_dims
from gemma4_jax.model.multimodal import Sounds
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.stack import LAYER_INPUT, REMAT
from gemma4_jax.sharding import constrain, gather

ROLE = "audio"
CONVOLUTION = "audio_conv"
"""Role of kernels, whose few inputs no block of a grid fits."""


class Subsample(nnx.Module):
    """One of two convolutions 3 x 3 with stride 2, then LayerNorm over channels (no bias) and ReLU: [A, F, M, C] halved."""

    def __init__(self, channels: Dims, out: Dims, eps: float, *, rngs: nnx.Rngs, dtype: str):
        kernel = {**channels, "kernel_time": 3, "kernel_mel": 3}
        self.conv = Weight(kernel, out, role=CONVOLUTION, stack={}, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(out)
        self.scale = nnx.Param(jnp.ones(shape, dtype), dims=names)
        self.eps = eps

    def __call__(self, x_AFMC: jax.Array, valid_AF: jax.Array) -> jax.Array:
        """Frames that are not valid count as silence, as what lies beyond the ends of the array does."""
        x = jnp.where(valid_AF[:, :, None, None], x_AFMC, jnp.zeros((), x_AFMC.dtype))
        x = jax.lax.conv_general_dilated(
            x,
            self.conv.rounded().astype(x.dtype),
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "IHWO", "NHWC"),
        )
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = normed * self.scale[...].astype(jnp.float32)[None, None, None]
        return jax.nn.relu(scaled).astype(x.dtype)


class Parts:
    """Makes the linear maps and norms of one tower."""

    def __init__(self, cfg: AudioConfig, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        self.cfg, self.stack, self.rngs, self.dtype = cfg, stack, rngs, dtype
        self.embed = {"audio_embed": cfg.hidden_size}

    def linear(self, inputs: Dims, outputs: Dims) -> ClippedLinear:
        clipped = self.cfg.use_clipped_linears
        return ClippedLinear(
            inputs, outputs, clipped=clipped, role=ROLE, stack=self.stack, rngs=self.rngs, dtype=self.dtype
        )

    def norm(self) -> RMSNorm:
        return RMSNorm(self.embed, self.cfg.rms_norm_eps, stack=self.stack, dtype=self.dtype)


class HalfStep(nnx.Module):
    """x + 1/2 norm(down(silu(up(norm x)))): the feed-forward at either end of a conformer block."""

    def __init__(self, parts: Parts):
        wide = {"audio_ffw": 4 * parts.cfg.hidden_size}
        self.pre_norm, self.post_norm = parts.norm(), parts.norm()
        self.up, self.down = parts.linear(parts.embed, wide), parts.linear(wide, parts.embed)
        self.limit, self.weight = parts.cfg.gradient_clipping, parts.cfg.residual_weight

    def __call__(self, x_ATD: jax.Array) -> jax.Array:
        h = self.pre_norm(_limited(x_ATD, self.limit))
        h = _limited(self.down(jax.nn.silu(self.up(h))), self.limit)
        return x_ATD + self.post_norm(h) * self.weight


class LocalAttention(nnx.Module):
    """Each token sees itself and the `attention_context_left - 2` before it; logits are capped; all in float32.

    Queries come in chunks of W; the keys of a chunk are its own and those of the chunk before it.
    """

    def __init__(self, parts: Parts):
        cfg = parts.cfg
        heads = {"audio_heads": cfg.num_attention_heads, "audio_head_dim": cfg.head_dim}
        self.q, self.k, self.v = (parts.linear(parts.embed, heads) for _ in range(3))
        self.o = parts.linear(heads, parts.embed)
        self.relative_k = Linear(parts.embed, heads, role=ROLE, stack=parts.stack, rngs=parts.rngs, dtype=parts.dtype)
        names, shape = variable_dims(parts.stack, {"audio_head_dim": cfg.head_dim})
        self.per_dim_scale = nnx.Param(jnp.zeros(shape, parts.dtype), dims=names)
        self.chunk, self.cap, self.hidden = (
            cfg.attention_chunk_size,
            cfg.attention_logit_cap,
            cfg.attention_invalid_logits_value,
        )

    def __call__(self, x_ATD: jax.Array, valid_AT: jax.Array) -> jax.Array:
        q, k, v = (linear(x_ATD).astype(jnp.float32) for linear in (self.q, self.k, self.v))
        scale = jax.nn.softplus(self.per_dim_scale[...].astype(jnp.float32)) * (q.shape[-1] ** -0.5 / math.log(2))
        q, k = q * scale[None, None, None], k * (math.log(1 + math.e) / math.log(2))
        # [A, blocks, W or 2W, N, H]
        q, k, v = _chunks(q, self.chunk), _with_previous(_chunks(k, self.chunk)), _with_previous(_chunks(v, self.chunk))
        relative = self.relative_k(_sinusoids(self.chunk, x_ATD.shape[-1]).astype(x_ATD.dtype)).astype(jnp.float32)
        logits = jnp.einsum("AbTNH,AbSNH->AbNTS", q, k)
        logits = logits + _shifted(jnp.einsum("AbTNH,PNH->AbNTP", q, relative))
        logits = self.cap * jnp.tanh(logits / self.cap)
        seen = _with_previous(_chunks(valid_AT, self.chunk))[:, :, None, None] & _band(self.chunk)[None, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, self.hidden), axis=-1)
        out = jnp.einsum("AbNTS,AbSNH->AbTNH", weights, v)
        clips, length = valid_AT.shape
        return self.o(out.reshape(clips, -1, *out.shape[3:])[:, :length].astype(x_ATD.dtype))


class LightConv(nnx.Module):
    """x + out(silu(norm(conv(glu(start(norm x)))))), a depthwise convolution that looks back only."""

    def __init__(self, parts: Parts):
        cfg = parts.cfg
        self.pre_norm, self.conv_norm = parts.norm(), parts.norm()
        self.start = parts.linear(parts.embed, {"halves": 2, **parts.embed})
        self.end = parts.linear(parts.embed, parts.embed)
        taps = {"taps": cfg.conv_kernel_size}
        self.conv = Weight(taps, parts.embed, role=CONVOLUTION, stack=parts.stack, rngs=parts.rngs, dtype=parts.dtype)
        self.limit = cfg.gradient_clipping

    def __call__(self, x_ATD: jax.Array) -> jax.Array:
        halves = self.start(self.pre_norm(x_ATD))
        h = halves[..., 0, :] * jax.nn.sigmoid(halves[..., 1, :])
        taps = self.conv.rounded().astype(h.dtype)
        count, length = taps.shape[0], h.shape[1]
        padded = jnp.pad(h, ((0, 0), (count - 1, 0), (0, 0)))
        h = padded[:, :length] * taps[0][None, None]
        for i in range(1, count):
            h = h + padded[:, i : i + length] * taps[i][None, None]
        h = self.conv_norm(_limited(h, self.limit))
        return x_ATD + self.end(jax.nn.silu(h))


class Conformer(nnx.Module):
    """One block: half step, attention, convolution, half step, norm."""

    def __init__(self, parts: Parts):
        self.first, self.second = HalfStep(parts), HalfStep(parts)
        self.attention, self.conv = LocalAttention(parts), LightConv(parts)
        self.pre_attention_norm, self.post_attention_norm, self.out_norm = parts.norm(), parts.norm(), parts.norm()
        self.limit = parts.cfg.gradient_clipping

    def __call__(self, x_ATD: jax.Array, valid_AT: jax.Array) -> jax.Array:
        x = self.first(x_ATD)
        attended = self.attention(self.pre_attention_norm(_limited(x, self.limit)), valid_AT)
        x = x + self.post_attention_norm(_limited(attended, self.limit))
        x = self.second(self.conv(x))
        return self.out_norm(_limited(x, self.limit))


class AudioTower(nnx.Module):
    """Clips to soft tokens of `output_proj_dims`, before the projection to the text's width."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs, dtype: str):
        first, second = ({"audio_channels": channels} for channels in cfg.subsampling_conv_channels)
        embed = {"audio_embed": cfg.hidden_size}
        self.subsample_1 = Subsample({"mono": 1}, first, cfg.rms_norm_eps, rngs=rngs, dtype=dtype)
        inner = {"audio_channels_in": cfg.subsampling_conv_channels[0]}
        self.subsample_2 = Subsample(inner, second, cfg.rms_norm_eps, rngs=rngs, dtype=dtype)
        flat = {"bands": cfg.bands, **second}
        self.start = Linear(flat, embed, role=ROLE, stack={}, rngs=rngs, dtype=dtype)
        parts = Parts(cfg, stack={"tower_layers": cfg.num_hidden_layers}, rngs=rngs, dtype=dtype)
        self.layers = Conformer(parts)
        out = {"audio_out": cfg.output_proj_dims}
        self.end = Linear(embed, out, role=ROLE, stack={}, rngs=rngs, dtype=dtype)
        names, shape = variable_dims(out)
        self.end_bias = nnx.Param(jnp.zeros(shape, dtype), dims=names)
        self.cfg = cfg

    def __call__(self, sounds: Sounds, dtype: jax.typing.DTypeLike, *, remat: str = "none") -> jax.Array:
        """[A, soft_frames(F), output_proj_dims] in `dtype`; what stands after the end of a clip means nothing."""
        h, valid = self._subsampled(sounds, dtype)

        def run(layer: Conformer, h: jax.Array) -> jax.Array:
            layer, h = gathered(layer, h.dtype), checkpoint_name(h, LAYER_INPUT)
            return constrain(layer(h, valid), "media", None, None)

        if remat != "none":
            run = jax.checkpoint(run, policy=REMAT[remat])
        h, _ = jax.lax.scan(lambda h, layer: (run(layer, h), None), constrain(h, "media", None, None), self.layers)
        bias = gather(self.end_bias[...].astype(dtype), self.end_bias.dims)
        return gathered(self.end, dtype)(h) + bias[None, None]

    def _subsampled(self, sounds: Sounds, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """A quarter of the frames at the tower's width [A, T, D], and which are valid [A, T]."""
        x, valid = sounds.mel.astype(dtype)[..., None], sounds.valid
        for layer in (self.subsample_1, self.subsample_2):
            x, valid = gathered(layer, dtype)(x, valid), valid[:, ::2]
        return gathered(self.start, dtype)(x), valid


def _limited(x: jax.Array, limit: float) -> jax.Array:
    """x between -limit and limit, or what its dtype holds."""
    limit = min(limit, float(jnp.finfo(x.dtype).max))
    return jnp.clip(x, -limit, limit)


def _chunks(x_AT: jax.Array, size: int) -> jax.Array:
    """[A, T, ...] as [A, blocks, size, ...], zeros (False) after the end."""
    clips, length, *rest = x_AT.shape
    blocks = -(-length // size)
    padded = jnp.pad(x_AT, ((0, 0), (0, blocks * size - length), *((0, 0) for _ in rest)))
    return padded.reshape(clips, blocks, size, *rest)


def _with_previous(x_AbW: jax.Array) -> jax.Array:
    """Each chunk after the one before it: [A, blocks, 2 W, ...]; zeros (False) before the first."""
    before = jnp.pad(x_AbW[:, :-1], ((0, 0), (1, 0), *((0, 0) for _ in x_AbW.shape[2:])))
    return jnp.concatenate([before, x_AbW], axis=2)


def _band(size: int) -> jax.Array:
    """[W, 2 W]: query i sees the key of slot c of its context if 0 <= i + W - c < W."""
    distance = jnp.arange(size)[:, None] + size - jnp.arange(2 * size)[None]
    return (distance >= 0) & (distance < size)


def _sinusoids(size: int, width: int) -> jax.Array:
    """float32 [W + 1, width]: sines, then cosines, of the distances W, W - 1, ..., 0 at geometric time scales up to 10,000."""
    count = width // 2
    rates = jnp.exp(jnp.arange(count, dtype=jnp.float32) * (-math.log(10_000.0) / max(count - 1, 1)))
    angle = jnp.arange(size, -1, -1, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _shifted(x_AbNTP: jax.Array) -> jax.Array:
    """[.., W, W + 1] by distance -> [.., W, 2 W] by slot of the context: out[i, c] = x[i, c - i], where that exists.

    Rows padded to 2 W + 1 and read with a stride of 2 W move one to the right each; what lies elsewhere is outside the band.
    """
    *lead, rows, columns = x_AbNTP.shape
    x = jnp.pad(x_AbNTP, (*((0, 0) for _ in lead), (0, 0), (0, 2 * rows + 1 - columns)))
    return x.reshape(*lead, -1)[..., : rows * 2 * rows].reshape(*lead, rows, 2 * rows)

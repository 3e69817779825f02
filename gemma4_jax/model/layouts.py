"""What a cache stores of a token: three layouts of keys and values, and two ways to store them in 8 bits.

Full layers of 26B and 31B have one projection for both: v is its RMS-normed output, and k the same times a learned scale,
with the first quarter of the rotary pairs turned by the position. So k need not be stored beside v (numbers per token and head):

    plain            1024   k and v
    unified           640   v, and the 128 dims of k that turn; the others are v times the scale, which moves to the query
    rotate_on_read    512   v alone; those 128 dims are turned again whenever they are read

All three are the same function: in float64 they differ by 1.5e-14. Layers with a value projection of their own are stored plain.
Unified is the default where there is a choice: it reads 0.63 times the bytes of plain at every step and computes nothing
more, while `rotate_on_read` turns every stored key again for every new token (0.5 times the bytes, and sines and cosines of the
whole text, which costs more than the 128 numbers it saves unless memory is what limits the text's length).

The dims that turn stand first in the stored vectors, so that both halves are slices.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gemma4_jax.config import LayerKind, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.kernels.cached import Codes, Fresh
from gemma4_jax.model.rope import rotate, rotation

Layout = Literal["plain", "unified", "rotate_on_read"]
Storage = Literal["compute", "int8", "fp8"]

STORED = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
"""Dtype and largest number of the 8-bit ways; each vector's largest number is scaled to it."""


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How a cache stores tokens. `layout` is that of layers whose values are their keys."""

    layout: Layout = "plain"
    storage: Storage = "compute"

    @classmethod
    def of(cls, cfg: ModelConfig, layout: Layout | None = None, storage: Storage = "compute") -> "CacheFormat":
        """The format for a model; layout None: unified where values are keys, else plain. UserError for one it cannot have."""
        if layout not in (None, "plain") and not cfg.attention_k_eq_v:
            raise UserError(
                f"cache.layout={layout} stores values that are keys at once, but this model projects them apart; "
                "leave it out or set plain."
            )
        return cls(layout or ("unified" if cfg.attention_k_eq_v else "plain"), storage)

    def of_kind(self, cfg: ModelConfig, kind: LayerKind) -> Layout:
        """The layout of a layer of this kind."""
        return self.layout if cfg.k_is_v(kind) else "plain"


def turning(cfg: ModelConfig, kind: LayerKind) -> int:
    """Rotary pairs that turn."""
    return int(cfg.rope(kind).partial_rotary_factor * cfg.head_size(kind) // 2)


def widths(cfg: ModelConfig, kind: LayerKind, cache_format: CacheFormat) -> dict[str, int]:
    """Numbers per token and head of each part that is stored."""
    head = cfg.head_size(kind)
    return {
        "plain": {"k": head, "v": head},
        "unified": {"turned": 2 * turning(cfg, kind), "v": head},
        "rotate_on_read": {"v": head},
    }[cache_format.of_kind(cfg, kind)]


def blank(
    cfg: ModelConfig, kind: LayerKind, cache_format: CacheFormat, batch: int, slots: int, dtype
) -> dict[str, Codes]:
    """The parts of an empty layer, [B, K, S, W] and scales [B, K, S]."""
    lead = batch, cfg.kv_heads(kind), slots
    parts = {}
    for name, width in widths(cfg, kind, cache_format).items():
        if cache_format.storage == "compute":
            parts[name] = Codes(jnp.zeros((*lead, width), dtype))
        else:
            parts[name] = Codes(
                jnp.zeros((*lead, width), STORED[cache_format.storage][0]), jnp.zeros(lead, jnp.float32)
            )
    return parts


def encoded(
    cfg: ModelConfig, kind: LayerKind, cache_format: CacheFormat, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> dict[str, Codes]:
    """The parts of new tokens, [B, T, K, W] and scales [B, T, K], from k (normed, rotated) and v (normed)."""
    layout = cache_format.of_kind(cfg, kind)
    if layout == "plain":
        parts = {"k": k_BTKH, "v": v_BTKH}
    else:
        parts = {"v": jnp.concatenate(_turning_first(v_BTKH, turning(cfg, kind)), axis=-1)}
        if layout == "unified":
            parts["turned"] = _turning_first(k_BTKH, turning(cfg, kind))[0]
    return {name: _codes(x, cache_format.storage) for name, x in parts.items()}


def decoded(codes: Codes, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The numbers that codes stand for."""
    if codes.scale is None:
        return codes.values.astype(dtype)
    return (codes.values.astype(jnp.float32) * codes.scale[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A layer's cache as queries see it.

    Attributes:
        parts: as `blank` makes them.
        positions: int32 [P, S], -1 where empty, of the rows that are looked at.
        rows: int32 [P], the rows of `parts` the queries belong to; None: all, in order.
        fresh: the queries' own tokens, where they are not among the parts yet.
        key_scale: [H], what the layer's keys were scaled with, where keys are not stored.
        cfg, kind, layout: how the parts are to be read.
    """

    parts: dict[str, Codes]
    positions: jax.Array
    rows: jax.Array | None
    key_scale: jax.Array | None
    fresh: Fresh | None
    cfg: ModelConfig = dataclasses.field(metadata={"static": True})
    kind: LayerKind = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    def queries(self, q_BTNH: jax.Array) -> tuple[jax.Array, ...]:
        """The parts of rotated queries that multiply the parts of `keys`."""
        if self.layout == "plain":
            return (q_BTNH,)
        assert self.key_scale is not None
        t, half = turning(self.cfg, self.kind), q_BTNH.shape[-1] // 2
        scaled = q_BTNH * self.key_scale.astype(q_BTNH.dtype)[None, None, None]
        _, rest = _turning_first(scaled, t)
        still = jnp.concatenate([jnp.zeros((*q_BTNH.shape[:-1], 2 * t), q_BTNH.dtype), rest], axis=-1)
        turned = _turning_first(q_BTNH, t)[0]
        assert half >= t
        return turned, still

    def keys(
        self, parts: dict[str, Codes], positions_BS: jax.Array, key_scale: jax.Array | None, dtype
    ) -> tuple[Codes, ...]:
        """The keys of a block of slots in the parts that `queries` has."""
        if self.layout == "plain":
            return (parts["k"],)
        if self.layout == "unified":
            return parts["turned"], parts["v"]
        assert key_scale is not None
        t, rope = turning(self.cfg, self.kind), self.cfg.rope(self.kind)
        v = parts["v"]
        part = decoded(Codes(v.values[..., : 2 * t], v.scale), dtype)
        part = part * _turning_first(key_scale.astype(dtype), t)[0][None, None, None]
        turn = rotation(positions_BS, self.cfg.head_size(self.kind), rope)
        turned = rotate(part.swapaxes(1, 2), (turn[0][..., :t], turn[1][..., :t])).swapaxes(1, 2)
        return Codes(turned), v

    def output(self, out_BTNW: jax.Array) -> jax.Array:
        """Attention's output with the value's dims in their own order again."""
        if self.layout == "plain":
            return out_BTNW
        t, half = turning(self.cfg, self.kind), out_BTNW.shape[-1] // 2
        first, second, rest, last = jnp.split(out_BTNW, [t, 2 * t, t + half], axis=-1)
        return jnp.concatenate([first, rest, second, last], axis=-1)


def _turning_first(x: jax.Array, t: int) -> tuple[jax.Array, jax.Array]:
    """The dims of the first t rotary pairs, and the others in order."""
    half = x.shape[-1] // 2
    first, rest, second, last = jnp.split(x, [t, half, half + t], axis=-1)
    return jnp.concatenate([first, second], axis=-1), jnp.concatenate([rest, last], axis=-1)


def _codes(x_BTKW: jax.Array, storage: Storage) -> Codes:
    if storage == "compute":
        return Codes(x_BTKW)
    dtype, largest = STORED[storage]
    x = x_BTKW.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / largest
    values = x / scale[..., None]
    values = jnp.round(values) if storage == "int8" else jnp.clip(values, -largest, largest)
    return Codes(values.astype(dtype), scale)

"""Attention of one layer: projections, head norms, rotation, and whose keys it reads."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from gemma4_jax.config import LayerKind, ModelConfig
from gemma4_jax.model.attend import attend
from gemma4_jax.model.kv import KV
from gemma4_jax.model.layouts import View
from gemma4_jax.model.linear import Buffer, Dims, Linear, Rounding, value_of
from gemma4_jax.model.norm import RMSNorm, rms_norm
from gemma4_jax.model.rope import Rotation, rotate
from gemma4_jax.sharding import constrain

Keep = Callable[[jax.Array, jax.Array], KV | View]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens stand: positions int32 [B, T] (-1 padding), segment ids or None, rotation per layer kind.

    `last` int32 [B, T]: the last position each token sees in sliding layers, at most `ahead` after its own; None: its own.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    turn: dict[LayerKind, Rotation]
    last: jax.Array | None = None
    ahead: int = dataclasses.field(default=0, metadata={"static": True})


class Attention(nnx.Module):
    """Grouped-query attention with RMS norms on q and k (scaled) and v (unscaled), and softmax scale 1.

    `owns_kv=False` layers have no k and v projections at all; full layers of 26B and 31B have no v projection: there
    the value is the raw key projection, before key norm and rotation. `kv_rounding` and its scales are set by a policy.
    """

    def __init__(self, cfg: ModelConfig, kind: LayerKind, owns_kv: bool, *, stack: Dims, rngs: nnx.Rngs, dtype: str):
        embed, head = {"embed": cfg.hidden_size}, {"head_dim": cfg.head_size(kind)}
        queries = {"q_heads": cfg.num_attention_heads, **head}
        keys = {"kv_heads": cfg.kv_heads(kind), **head}

        def linear(inputs: Dims, outputs: Dims) -> Linear:
            return Linear(inputs, outputs, role="attention", stack=stack, rngs=rngs, dtype=dtype)

        def norm() -> RMSNorm:
            return RMSNorm(head, cfg.rms_norm_eps, stack=stack, dtype=dtype)

        self.q, self.q_norm = linear(embed, queries), norm()
        self.o = linear(queries, embed)
        self.k = linear(embed, keys) if owns_kv else None
        self.k_norm = norm() if owns_kv else None
        self.v = linear(embed, keys) if owns_kv and not cfg.k_is_v(kind) else None
        self.kv_rounding: Rounding | None = None
        self.k_cache_scale: Buffer | None = nnx.data(None)
        self.v_cache_scale: Buffer | None = nnx.data(None)
        self.kind: LayerKind = kind
        self.window = cfg.window(kind)
        self.eps = cfg.rms_norm_eps

    def set_kv_rounding(self, rounding: Rounding | None) -> None:
        """Rounds the keys and values this layer makes, if it makes any; static scales start at 0, not calibrated."""
        self.kv_rounding = rounding if self.k is not None else None
        for name in ("k_cache_scale", "v_cache_scale"):
            setattr(self, name, None if self.k is None else self.k.scale_buffer(rounding))

    def kv_shape(self, x_BTD: jax.Array) -> tuple[int, ...]:
        """Shape [B, T, K, H] of the keys (and of the values) that this layer makes of x."""
        assert self.k is not None
        return (*x_BTD.shape[:2], *self.k.w.shape[-2:])

    def keys_values(self, x_BTD: jax.Array, places: Places) -> tuple[jax.Array, jax.Array]:
        """k (normed and rotated) and v (normed) of the layer's own tokens, each [B, T, K, H]."""
        assert self.k is not None
        assert self.k_norm is not None
        raw = constrain(self.k(x_BTD), "batch", "length", "kv_heads", None)
        v = raw if self.v is None else constrain(self.v(x_BTD), "batch", "length", "kv_heads", None)
        k, v = rotate(self.k_norm(raw), places.turn[self.kind]), rms_norm(v, self.eps)
        if self.kv_rounding is None:
            return k, v
        # Here, and so once: layers that share them get them rounded.
        rounded = self.kv_rounding.enter
        return rounded(k, value_of(self.k_cache_scale)), rounded(v, value_of(self.v_cache_scale))

    def __call__(self, x_BTD: jax.Array, places: Places, source: KV | View | Keep) -> tuple[jax.Array, KV | View]:
        """The layer's output and what it looked at.

        `source` is what another layer looked at where `owns_kv` is False, else the function that takes the layer's new k, v and
        returns what its queries shall see (those alone in training, the cache they were written to in decoding).
        """
        kv = source if isinstance(source, KV | View) else source(*self.keys_values(x_BTD, places))
        q = constrain(self.q(x_BTD), "batch", "length", "q_heads", None)
        q = rotate(self.q_norm(q), places.turn[self.kind])
        # Full layers are causal inside an image too.
        last, ahead = (places.last, places.ahead) if self.kind == "sliding" else (None, 0)
        return self.o(attend(q, kv, places.positions, places.segment_ids, self.window, last, ahead)), kv

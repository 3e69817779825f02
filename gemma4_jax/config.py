"""What a Gemma 4 model is: its sizes, the four published variants, Hugging Face's config.json, and the layer plan.

Field names are Hugging Face's where config.json has them. Whatever follows from other fields is a property.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from gemma4_jax.config_media import TOWERS, AudioConfig, VisionConfig
from gemma4_jax.errors import UserError, did_you_mean

LayerKind = Literal["sliding", "full"]
KINDS: tuple[LayerKind, LayerKind] = ("sliding", "full")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer kind: base period and the share of the head that rotates."""

    theta: float
    partial_rotary_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stack:
    """`blocks` equal blocks of `sliding` sliding layers and one full layer, scanned as one piece.

    `owns_kv` is False where the layers read the keys and values of the last layer of their kind that has its own.
    """

    name: str
    first_layer: int
    blocks: int
    sliding: int
    owns_kv: bool
    ffw: int

    @property
    def block_size(self) -> int:
        """Layers per block."""
        return self.sliding + 1

    @property
    def layers(self) -> int:
        """Layers in the whole stack."""
        return self.blocks * self.block_size

    def layer(self, block: int, position: int) -> int:
        """Index in the model of the layer at `position` of `block`; the full layer stands last."""
        return self.first_layer + block * self.block_size + position


_WIDTH, _COUNT = (1, 1 << 20), (1, 1 << 12)
_BOUNDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "sliding_window", "head_dim", "global_head_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "layer_period", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), _COUNT),
    **dict.fromkeys(("num_kv_shared_layers", "num_experts", "top_k_experts"), (0, 1 << 12)),
    **dict.fromkeys(("hidden_size_per_layer_input", "moe_intermediate_size"), (0, 1 << 20)),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings"), (1, 1 << 30)),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), (0, 1 << 30)),
}
"""Least and most of every number: what lies outside is a broken file, and would fail later and worse."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Gemma 4 variant: the text model, and its towers where it has them; hashable, so a static argument of jit.

    `global_head_dim` and `num_global_key_value_heads` belong to the full-attention layers, `head_dim` and
    `num_key_value_heads` to the sliding ones. `layer_period` is the distance between full layers. A model has a vision or
    audio tower exactly if `vision` or `audio` is not None.
    """

    hidden_size: int
    num_hidden_layers: int
    layer_period: int
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int
    intermediate_size: int
    sliding_window: int
    max_position_embeddings: int
    vocab_size: int = 262144
    head_dim: int = 256
    global_head_dim: int = 512
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int | None = None
    attention_k_eq_v: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    use_bidirectional_attention: str | None = None
    rope_sliding: Rope = Rope(10_000.0)
    rope_full: Rope = Rope(1_000_000.0, 0.25)
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    vision: VisionConfig | None = None
    audio: AudioConfig | None = None

    def __post_init__(self):
        if self.vocab_size_per_layer_input is None:
            object.__setattr__(self, "vocab_size_per_layer_input", self.vocab_size)
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"{name} is a whole number from {least:,} to {most:,}, got {value!r}.")
        for name in ("rms_norm_eps", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < 1e30):
                raise UserError(f"{name} is a number above 0, got {value!r}.")
        if self.use_bidirectional_attention not in (None, "vision"):
            raise UserError(
                f"use_bidirectional_attention={self.use_bidirectional_attention!r} is not supported: "
                "generation models have null or 'vision'; embedding models ('all') are outside this project."
            )
        for total, part, what in (
            (self.num_hidden_layers, self.layer_period, "num_hidden_layers"),
            (self.num_kv_shared_layers, self.layer_period, "num_kv_shared_layers"),
        ):
            if part < 2 or total % part:
                raise UserError(
                    f"{what}={total} must be whole blocks of {part} layers ({part - 1} sliding, then 1 full); "
                    "every published Gemma 4 is. Check layer_types."
                )
        if self.num_kv_shared_layers >= self.num_hidden_layers:
            raise UserError(
                f"num_kv_shared_layers={self.num_kv_shared_layers} leaves none of {self.num_hidden_layers} "
                "layers to produce keys and values; it must be smaller."
            )
        for kind in KINDS:
            if self.num_attention_heads % self.kv_heads(kind):
                raise UserError(
                    f"{self.num_attention_heads} query heads cannot be grouped over {self.kv_heads(kind)} "
                    f"key/value heads of the {kind} layers: the first must be a multiple of the second."
                )
        if self.num_experts and not 0 < self.top_k_experts <= self.num_experts:
            raise UserError(f"top_k_experts={self.top_k_experts} must lie in 1..num_experts={self.num_experts}.")

    @classmethod
    def variant(cls, name: str, *, multimodal: Any = False, **overrides: Any) -> "ModelConfig":
        """A published variant (`e2b e4b 26b_a4b 31b`) or its tiny twin (`tiny_e2b` ...), with fields replaced.

        `multimodal` adds the variant's vision and audio towers; without them it is the text model.
        """
        if name not in VARIANTS:
            raise UserError(f"Unknown model variant {name!r}; {did_you_mean(name, VARIANTS)}")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in overrides:
            if key not in known:
                raise UserError(f"ModelConfig has no field {key!r}; {did_you_mean(key, known)}")
        return cls(**{**VARIANTS[name], **(TOWERS[name] if multimodal else {}), **overrides})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face config.json (whole model or text only, old or new spelling)."""
        from gemma4_jax.config_hf import from_hf

        return from_hf(config)

    def to_hf(self, *, dtype: str = "bfloat16", spelling: Literal["new", "old"] = "new") -> dict[str, Any]:
        """The config.json that transformers reads: `Gemma4ForConditionalGeneration` with towers, else `Gemma4ForCausalLM`."""
        from gemma4_jax.config_hf import to_hf

        return to_hf(self, dtype=dtype, spelling=spelling)

    def text_only(self) -> "ModelConfig":
        """The same text model without towers."""
        return dataclasses.replace(self, vision=None, audio=None)

    @property
    def is_multimodal(self) -> bool:
        """Whether there is a tower."""
        return self.vision is not None or self.audio is not None

    @property
    def sees_ahead(self) -> bool:
        """Whether tokens of an image see the whole image in sliding layers (26B, 31B)."""
        return self.vision is not None and self.use_bidirectional_attention == "vision"

    def kv_heads(self, kind: LayerKind) -> int:
        """Key/value heads of a layer of this kind."""
        return self.num_key_value_heads if kind == "sliding" else self.num_global_key_value_heads

    def head_size(self, kind: LayerKind) -> int:
        """Head dim of a layer of this kind."""
        return self.head_dim if kind == "sliding" else self.global_head_dim

    def rope(self, kind: LayerKind) -> Rope:
        """Rotary parameters of a layer of this kind."""
        return self.rope_sliding if kind == "sliding" else self.rope_full

    def window(self, kind: LayerKind) -> int | None:
        """Keys a query sees, itself included; None for all."""
        return self.sliding_window if kind == "sliding" else None

    def k_is_v(self, kind: LayerKind) -> bool:
        """True where values come from the key projection (full layers of 26B and 31B)."""
        return self.attention_k_eq_v and kind == "full"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer in order."""
        block: tuple[LayerKind, ...] = ("sliding",) * (self.layer_period - 1) + ("full",)
        return block * (self.num_hidden_layers // self.layer_period)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layer plan: layers with their own keys and values, then those that share."""
        own = self.num_hidden_layers - self.num_kv_shared_layers
        period = self.layer_period
        plan = [Stack("own", 0, own // period, period - 1, True, self.intermediate_size)]
        if self.num_kv_shared_layers:
            wide = self.intermediate_size * (2 if self.use_double_wide_mlp else 1)
            plan.append(Stack("shared", own, self.num_kv_shared_layers // period, period - 1, False, wide))
        return tuple(plan)


_E_SERIES = dict(
    num_attention_heads=8, sliding_window=512, max_position_embeddings=131072, hidden_size_per_layer_input=256
)
_LARGE = dict(
    sliding_window=1024,
    max_position_embeddings=262144,
    layer_period=6,
    attention_k_eq_v=True,
    use_bidirectional_attention="vision",
)
# The tiny twins keep every structural feature of their elder; every input dim is a multiple of the 32-wide int4 block.
_TINY = dict(
    vocab_size=896, hidden_size=128, head_dim=32, global_head_dim=64, sliding_window=64, max_position_embeddings=2048
)

VARIANTS: dict[str, dict[str, Any]] = {
    "e2b": dict(
        _E_SERIES,
        hidden_size=1536,
        num_hidden_layers=35,
        layer_period=5,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        intermediate_size=6144,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "e4b": dict(
        _E_SERIES,
        hidden_size=2560,
        num_hidden_layers=42,
        layer_period=6,
        num_key_value_heads=2,
        num_global_key_value_heads=2,
        intermediate_size=10240,
        num_kv_shared_layers=18,
    ),
    "26b_a4b": dict(
        _LARGE,
        hidden_size=2816,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        intermediate_size=2112,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31b": dict(
        _LARGE,
        hidden_size=5376,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        intermediate_size=21504,
    ),
}
VARIANTS |= {
    "tiny_e2b": {
        **VARIANTS["e2b"],
        **_TINY,
        "num_hidden_layers": 15,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 32,
    },
    "tiny_e4b": {
        **VARIANTS["e4b"],
        **_TINY,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 32,
    },
    "tiny_26b_a4b": {
        **VARIANTS["26b_a4b"],
        **_TINY,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "intermediate_size": 128,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "tiny_31b": {
        **VARIANTS["31b"],
        **_TINY,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "intermediate_size": 384,
    },
}

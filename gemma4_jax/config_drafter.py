"""What a drafter is: the small model published beside each Gemma 4 that proposes its next tokens (`gemma4_assistant`).

Source: transformers 5.23, models/gemma4_assistant/configuration_gemma4_assistant.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.config_hf import from_hf
from gemma4_jax.errors import UserError, did_you_mean

_SIZES: dict[str, dict[str, int]] = {
    "e2b": dict(hidden_size=256, intermediate_size=2048, num_attention_heads=4, num_centroids=2048),
    "e4b": dict(hidden_size=256, intermediate_size=2048, num_attention_heads=4, num_centroids=2048),
    "26b_a4b": dict(hidden_size=1024, intermediate_size=8192, num_attention_heads=16),
    "31b": dict(hidden_size=1024, intermediate_size=8192, num_attention_heads=32),
    "tiny_e2b": dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_centroids=32),
    "tiny_e4b": dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_centroids=32),
    "tiny_26b_a4b": dict(hidden_size=64, intermediate_size=96, num_attention_heads=4),
    "tiny_31b": dict(hidden_size=64, intermediate_size=96, num_attention_heads=8),
}
"""Own widths and heads; what touches the target is the target's. Published ones as others read them from the files (78 M, 0.5 B
parameters); `from_hf` is what decides."""

PUBLISHED = {1536: "E2B", 2560: "E4B", 2816: "26B-A4B", 5376: "31B"}
"""The width of each published model, and its name: of the drafter for it, `google/gemma-4-NAME-it-assistant`."""


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A drafter: its layers, the model it drafts for, and how it scores tokens.

    Attributes:
        text: its layers, all of which read the target's keys and values; heads, windows and rotation are the target's.
        backbone_hidden_size: width of the target.
        num_centroids: clusters of the vocabulary, of which only the best are scored; 0: every token is.
        centroid_intermediate_top_k: clusters that are scored.
    """

    text: ModelConfig
    backbone_hidden_size: int
    num_centroids: int = 0
    centroid_intermediate_top_k: int = 32

    def __post_init__(self) -> None:
        if self.num_centroids and self.text.vocab_size % self.num_centroids:
            raise UserError(
                f"num_centroids={self.num_centroids} must divide the vocabulary of {self.text.vocab_size} tokens."
            )
        if self.num_centroids and not 1 <= self.centroid_intermediate_top_k <= self.num_centroids:
            raise UserError(
                f"centroid_intermediate_top_k={self.centroid_intermediate_top_k} must lie in 1..num_centroids={self.num_centroids}."
            )

    @classmethod
    def variant(cls, name: str) -> "DrafterConfig":
        """The drafter of a published variant or of its tiny twin."""
        if name not in _SIZES:
            raise UserError(f"Unknown drafter variant {name!r}; {did_you_mean(name, _SIZES)}")
        return cls.beside(ModelConfig.variant(name), **_SIZES[name])

    @classmethod
    def beside(
        cls, target: ModelConfig, *, num_centroids: int = 0, centroid_intermediate_top_k: int | None = None, **own: int
    ) -> "DrafterConfig":
        """A drafter of three sliding layers and a full one that fits `target`; `own`: its widths and heads."""
        text = dataclasses.replace(
            target.text_only(),
            **{"num_hidden_layers": 4, "layer_period": 4, **own},
            num_kv_shared_layers=0,
            use_double_wide_mlp=False,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=target.vocab_size,
            num_experts=0,
            top_k_experts=0,
            moe_intermediate_size=0,
            use_bidirectional_attention=None,
        )
        top = (
            min(32, max(1, num_centroids // 8)) if centroid_intermediate_top_k is None else centroid_intermediate_top_k
        )
        return cls(text, target.hidden_size, num_centroids, top)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DrafterConfig":
        """Reads a drafter's config.json; UserError names a missing, wrong or unsupported key."""
        kind, text = config.get("model_type"), config.get("text_config")
        if kind != "gemma4_assistant":
            raise UserError(
                f"config.json has model_type {kind!r}; wanted 'gemma4_assistant', a drafter such as "
                "google/gemma-4-E2B-it-assistant."
            )
        if not isinstance(text, Mapping):
            raise UserError("config.json has no text_config; a drafter's layers are described there.")
        for key in ("hidden_size_per_layer_input", "enable_moe_block", "use_double_wide_mlp"):
            if text.get(key):
                raise UserError(f"config.json's {key} is {text[key]!r}; no drafter has it, wanted 0 or false.")
        vocab = text.get("vocab_size")
        plain = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": vocab, "num_kv_shared_layers": 0}
        layers = from_hf({"model_type": "gemma4_text", **text, **plain, "use_bidirectional_attention": None})
        numbers = {}
        for key, default in (("backbone_hidden_size", 1536), ("num_centroids", 2048)):
            numbers[key] = config.get(key, default)
        numbers["centroid_intermediate_top_k"] = config.get("centroid_intermediate_top_k", 32)
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"config.json's {key} must be a whole number from 1, got {value!r}.")
        if not config.get("use_ordered_embeddings", False):
            numbers["num_centroids"] = 0
        return cls(layers, **numbers)

    def check_target(self, target: ModelConfig) -> None:
        """UserError unless this drafter can read the keys and values of `target`."""
        if self.backbone_hidden_size != target.hidden_size:
            mine, wanted = PUBLISHED.get(self.backbone_hidden_size), PUBLISHED.get(target.hidden_size)
            hint = "" if wanted is None else f"; take google/gemma-4-{wanted}-it-assistant"
            named = "" if mine is None else f" ({mine})"
            raise UserError(
                f"The drafter was made for a model of width {self.backbone_hidden_size}{named}, and this one has "
                f"{target.hidden_size}{hint}."
            )
        pairs = [("vocab_size", self.text.vocab_size, target.vocab_size)]
        for kind in KINDS:
            pairs += [
                (f"head dim of {kind} layers", self.text.head_size(kind), target.head_size(kind)),
                (f"key/value heads of {kind} layers", self.text.kv_heads(kind), target.kv_heads(kind)),
                (f"rotation of {kind} layers", self.text.rope(kind), target.rope(kind)),
            ]
        pairs.append(("sliding_window", self.text.sliding_window, target.sliding_window))
        for what, mine, wanted in pairs:
            if mine != wanted:
                raise UserError(
                    f"The drafter does not fit this model: its {what} is {mine}, the model's {wanted}; take the drafter "
                    "published for this size."
                )

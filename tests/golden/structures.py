"""The Gemma 4 structures the fixtures cover, as transformers configurations: four tiny twins and the four real sizes.

A tiny twin has the layer pattern, sharing, projections and experts of its real variant and shrunken widths. The two
spellings of `config.json` are both made here: transformers >= 5.2x writes `per_layer_config`, published checkpoints
carry `global_head_dim` and `num_global_key_value_heads`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import Gemma4Config, Gemma4TextConfig

SPECIAL_IDS = {  # inside the tiny vocabulary; the fixtures' tokens avoid them
    "boi_token_id": 312,
    "eoi_token_id": 313,
    "image_token_id": 314,
    "boa_token_id": 315,
    "eoa_token_index": 316,
    "audio_token_id": 317,
    "video_token_id": 318,
}
FIRST_SPECIAL_ID = 312


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One fixture: its structure, how its files are written, and the seeds its health checks accepted."""

    text: dict[str, Any]
    weight_seed: int
    token_seed: int
    towers: dict[str, dict[str, Any]] | None = None  # None: text-only Gemma4ForCausalLM, `model.*` names
    dead_shared_kv: bool = False  # the file also holds k_proj, v_proj, k_norm of the KV-shared layers
    old_spelling: bool = False
    max_shard_size: str = "50GB"

    @property
    def is_multimodal(self) -> bool:
        """True: `Gemma4ForConditionalGeneration`, `model.language_model.*` names and a nested config."""
        return self.towers is not None

    def config(self) -> Gemma4Config | Gemma4TextConfig:
        """Returns a new transformers configuration of the fixture."""
        text = Gemma4TextConfig(**copy.deepcopy(self.text))
        if self.towers is None:
            return text
        return Gemma4Config(text_config=text, **copy.deepcopy(self.towers), **SPECIAL_IDS)


def layer_types(num_layers: int, sliding_per_full: int) -> list[str]:
    """Returns `sliding_per_full` sliding layers, then a full one, repeated; `num_layers` must divide evenly."""
    block = ["sliding_attention"] * sliding_per_full + ["full_attention"]
    if num_layers % len(block):
        raise ValueError(f"{num_layers} layers are not a whole number of blocks of {len(block)}.")
    return block * (num_layers // len(block))


def _tiny_text(num_layers: int, sliding_per_full: int, **overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 320,
        "vocab_size_per_layer_input": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "layer_types": layer_types(num_layers, sliding_per_full),
        "num_attention_heads": 4,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        **overrides,
    }


def _tiny_vision(**overrides: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 32,
        **overrides,
    }


_TINY_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 48,
}

TINY: dict[str, Tiny] = {
    "tiny_e2b": Tiny(
        text=_tiny_text(
            15,
            4,
            num_key_value_heads=1,
            num_kv_shared_layers=5,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=32,
        ),
        towers={"vision_config": _tiny_vision(use_clipped_linears=True), "audio_config": _TINY_AUDIO},
        dead_shared_kv=True,
        weight_seed=12,
        token_seed=12,
    ),
    "tiny_e4b": Tiny(
        text=_tiny_text(
            18, 5, intermediate_size=64, num_key_value_heads=2, num_kv_shared_layers=6, hidden_size_per_layer_input=32
        ),
        weight_seed=28,
        token_seed=28,
    ),
    "tiny_26b_a4b": Tiny(
        text=_tiny_text(
            12,
            5,
            intermediate_size=64,
            num_key_value_heads=2,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            use_bidirectional_attention="vision",
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=32,
        ),
        towers={"vision_config": _tiny_vision(standardize=True)},
        old_spelling=True,
        max_shard_size="900KB",
        weight_seed=23,
        token_seed=23,
    ),
    "tiny_31b": Tiny(
        text=_tiny_text(
            12,
            5,
            num_key_value_heads=4,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            use_bidirectional_attention="vision",
        ),
        weight_seed=21,
        token_seed=21,
    ),
}

_MEDIA_TOWER = {"num_hidden_layers": 2, "position_embedding_size": 256}
MEDIA: dict[str, Tiny] = {
    "media_e2b": Tiny(
        text=_tiny_text(
            10,
            4,
            intermediate_size=48,
            num_key_value_heads=1,
            num_kv_shared_layers=5,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=16,
        ),
        towers={
            "vision_config": _tiny_vision(use_clipped_linears=True, **_MEDIA_TOWER),
            "audio_config": {**_TINY_AUDIO, "num_hidden_layers": 2},
        },
        weight_seed=41,
        token_seed=41,
    ),
    "media_31b": Tiny(
        text=_tiny_text(
            6,
            5,
            intermediate_size=64,
            num_key_value_heads=4,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            use_bidirectional_attention="vision",
        ),
        towers={"vision_config": _tiny_vision(standardize=True, **_MEDIA_TOWER)},
        weight_seed=42,
        token_seed=42,
    ),
}
"""Fixtures with towers of several layers and prompts with images, frames and sounds (`media_inputs.py`)."""


def _full_text(num_layers: int, sliding_per_full: int, **overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "num_hidden_layers": num_layers,
        "layer_types": layer_types(num_layers, sliding_per_full),
        "head_dim": 256,
        "global_head_dim": 512,
        "final_logit_softcapping": 30.0,
        **overrides,
    }


def _e_series(num_layers: int, sliding_per_full: int, **overrides: Any) -> dict[str, Any]:
    text = _full_text(
        num_layers,
        sliding_per_full,
        num_attention_heads=8,
        sliding_window=512,
        max_position_embeddings=131_072,
        hidden_size_per_layer_input=256,
        **overrides,
    )
    return {"text_config": text, "vision_config": {"use_clipped_linears": True}, "audio_config": {}}


def _large(num_layers: int, **overrides: Any) -> dict[str, Any]:
    text = _full_text(
        num_layers,
        5,
        sliding_window=1024,
        max_position_embeddings=262_144,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        **overrides,
    )
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "standardize": True,
    }
    return {"text_config": text, "vision_config": vision}


FULL: dict[str, dict[str, Any]] = {
    "e2b": _e_series(
        35,
        4,
        hidden_size=1536,
        intermediate_size=6144,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "e4b": _e_series(42, 5, hidden_size=2560, intermediate_size=10_240, num_key_value_heads=2, num_kv_shared_layers=18),
    "26b_a4b": _large(
        30,
        hidden_size=2816,
        intermediate_size=2112,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31b": _large(
        60,
        hidden_size=5376,
        intermediate_size=21_504,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
    ),
}


def full_config(name: str) -> Gemma4Config:
    """Returns the transformers configuration of a real variant: one of `FULL`."""
    return Gemma4Config(**copy.deepcopy(FULL[name]), dtype="bfloat16", architectures=["Gemma4ForConditionalGeneration"])


def to_old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a config.json dict with `per_layer_config` rewritten the way published checkpoints spell it."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    overrides = list(text.pop("per_layer_config").values())
    if any(entry != overrides[0] for entry in overrides):
        raise ValueError("The old spelling cannot say that full-attention layers differ from each other.")
    text["global_head_dim"] = overrides[0]["head_dim"]
    text["num_global_key_value_heads"] = overrides[0].get("num_key_value_heads")
    return config

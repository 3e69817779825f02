"""Hugging Face's config.json and ModelConfig, in both directions and both spellings.

Published configs carry `global_head_dim` and `num_global_key_value_heads`; transformers 5.23 writes
`per_layer_config = {"05": {"head_dim": .., "num_key_value_heads": ..}, ..}` instead (keys zero-padded).
Source: transformers 5.23, models/gemma4/configuration_gemma4.py.
"""

from collections.abc import Mapping
from typing import Any

from gemma4_jax import config_media
from gemma4_jax.config import ModelConfig, Rope
from gemma4_jax.errors import UserError

_KIND_NAMES = {"sliding": "sliding_attention", "full": "full_attention"}
_SAME_NAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "sliding_window max_position_embeddings"
).split()
# transformers' defaults, for keys a config.json may leave out.
_OPTIONAL = {
    "head_dim": 256,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "attention_k_eq_v": False,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json, towers included; UserError names a missing, wrong or unsupported key."""
    model_type = config.get("model_type")
    if model_type not in ("gemma4", "gemma4_text"):
        raise UserError(f"config.json has model_type {model_type!r}; wanted 'gemma4' or 'gemma4_text'.")
    text = config.get("text_config", config) if model_type == "gemma4" else config
    if not isinstance(text, Mapping):
        raise UserError(f"config.json's text_config must be a mapping, got {type(text).__name__}.")
    for key in _SAME_NAME:
        if not isinstance(text.get(key), int):
            raise UserError(f"config.json's {key} must be a whole number, got {text.get(key)!r}.")
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or text.get("attention_bias"):
        raise UserError("config.json asks for another activation or for attention biases; no Gemma 4 has these.")

    fields: dict[str, Any] = {key: text[key] for key in _SAME_NAME}
    fields |= {key: text.get(key, default) for key, default in _OPTIONAL.items()}
    fields["hidden_size_per_layer_input"] = fields["hidden_size_per_layer_input"] or 0
    fields["layer_period"] = _period(text)
    fields |= _full_layer_heads(text, fields)
    if text.get("enable_moe_block"):
        fields |= {key: text[key] for key in ("num_experts", "top_k_experts", "moe_intermediate_size")}
    fields |= _ropes(text.get("rope_parameters") or {})
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = text.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None:
            fields[key] = value
    towers = config_media.from_hf(config) if model_type == "gemma4" else {}
    return ModelConfig(**fields, **towers)


def to_hf(cfg: ModelConfig, *, dtype: str, spelling: str) -> dict[str, Any]:
    """A config.json; `spelling` is 'new' (per_layer_config) or 'old' (global_* keys)."""
    text = _text_to_hf(cfg, dtype=dtype, spelling=spelling)
    if not cfg.is_multimodal:
        return text
    del text["architectures"]
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": dtype,
        "tie_word_embeddings": True,
        "text_config": text,
        **config_media.to_hf(cfg.vision, cfg.audio),
    }


def _text_to_hf(cfg: ModelConfig, *, dtype: str, spelling: str) -> dict[str, Any]:
    """The text model alone, as `Gemma4ForCausalLM` has it."""
    out: dict[str, Any] = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": dtype}
    out |= {key: getattr(cfg, key) for key in (*_SAME_NAME, *_OPTIONAL)}
    out |= {key: getattr(cfg, key) for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    out |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "enable_moe_block": bool(cfg.num_experts),
        "num_experts": cfg.num_experts or None,
        "top_k_experts": cfg.top_k_experts or None,
        "moe_intermediate_size": cfg.moe_intermediate_size or None,
        "layer_types": [_KIND_NAMES[kind] for kind in cfg.layer_kinds],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": cfg.rope_sliding.theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": cfg.rope_full.theta,
                "partial_rotary_factor": cfg.rope_full.partial_rotary_factor,
            },
        },
    }
    if spelling == "old":
        # The published files name the key only where it differs from the sliding layers' heads.
        differs = cfg.num_global_key_value_heads != cfg.num_key_value_heads
        out["global_head_dim"] = cfg.global_head_dim
        out["num_global_key_value_heads"] = cfg.num_global_key_value_heads if differs else None
        return out
    width = len(str(cfg.num_hidden_layers - 1))
    full = {"head_dim": cfg.global_head_dim, "num_key_value_heads": cfg.num_global_key_value_heads}
    out["per_layer_config"] = {
        f"{layer:0{width}d}": dict(full) for layer, kind in enumerate(cfg.layer_kinds) if kind == "full"
    }
    return out


def _period(text: Mapping[str, Any]) -> int:
    """Distance between full layers; transformers forces the last layer to be full, and defaults to 5 sliding + 1."""
    layers = text["num_hidden_layers"]
    kinds = list(text.get("layer_types") or [])
    if not kinds:
        return 6
    if len(kinds) != layers:
        raise UserError(f"config.json lists {len(kinds)} layer_types for num_hidden_layers={layers}.")
    kinds[-1] = "full_attention"
    period = kinds.index("full_attention") + 1
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if kinds != expected:
        raise UserError(
            f"config.json's layer_types are not a repetition of {period - 1} sliding and 1 full layers "
            f"(first full layer at {period - 1}); every published Gemma 4 is."
        )
    return period


def _full_layer_heads(text: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, int]:
    """Head dim and key/value heads of the full layers, from either spelling."""
    per_layer = text.get("per_layer_config")
    if per_layer:
        kinds = {tuple(sorted(layer.items())) for layer in per_layer.values()}
        if len(kinds) != 1:
            raise UserError("config.json's per_layer_config gives full layers of different sizes; Gemma 4 has one.")
        full = dict(kinds.pop())
        heads = full.get("num_key_value_heads", fields["num_key_value_heads"])
        return {"global_head_dim": full.get("head_dim", fields["head_dim"]), "num_global_key_value_heads": heads}
    # transformers reads the key only with attention_k_eq_v, and so do we.
    heads = text.get("num_global_key_value_heads") if fields["attention_k_eq_v"] else None
    return {
        "global_head_dim": text.get("global_head_dim", 512),
        "num_global_key_value_heads": heads or fields["num_key_value_heads"],
    }


def _ropes(parameters: Mapping[str, Any]) -> dict[str, Rope]:
    """Rotary parameters by layer kind; only the two types Gemma 4 uses are known."""
    out = {}
    for kind, wanted in (("sliding", "default"), ("full", "proportional")):
        given = parameters.get(_KIND_NAMES[kind])
        if given is None:
            continue
        if given.get("rope_type", wanted) != wanted:
            raise UserError(f"config.json's {kind} layers have rope_type {given['rope_type']!r}; wanted {wanted!r}.")
        factor = given.get("partial_rotary_factor", 0.25) if kind == "full" else 1.0
        out[f"rope_{kind}"] = Rope(float(given["rope_theta"]), float(factor))
    return out

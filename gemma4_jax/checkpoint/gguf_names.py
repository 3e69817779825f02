"""Gemma 4 in GGUF: our config as metadata keys and back, and the name of every tensor.

Source: llama.cpp, conversion/gemma.py (what its converter writes) and src/models/gemma4.cpp (what its loader wants).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.gguf_file import Metadata, Value
from gemma4_jax.config import ModelConfig, Rope
from gemma4_jax.errors import UserError

ARCHITECTURE = "gemma4"
ROPE_FREQS = "rope_freqs.weight"
UNROTATED = 1e30
"""Divides the frequency of dims that do not rotate: ggml's rotation knows no gaps."""

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of `names.table`."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}" if layer else _TOP[name]


def is_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor (by its GGUF name) in float32: vectors, norms and the router."""
    return len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight") or "ffn_gate_inp" in name


def rope_freqs(cfg: ModelConfig) -> np.ndarray:
    """float32 [global_head_dim / 2]: 1 for the pairs of a full layer's head that rotate."""
    pairs = cfg.global_head_dim // 2
    rotating = int(cfg.global_head_dim * cfg.rope_full.partial_rotary_factor / 2)
    return np.where(np.arange(pairs) < rotating, np.float32(1), np.float32(UNROTATED)).astype(np.float32)


def metadata_of(cfg: ModelConfig) -> Metadata:
    """The `gemma4.*` keys, as llama.cpp's converter writes them."""
    full, sliding = cfg.global_head_dim, cfg.head_dim
    ffw = [stack.ffw for stack in cfg.stacks for _ in range(stack.layers)]
    heads = [cfg.kv_heads(kind) for kind in cfg.layer_kinds]
    values: dict[str, tuple[str, Any]] = {
        "block_count": ("u32", cfg.num_hidden_layers),
        "context_length": ("u32", cfg.max_position_embeddings),
        "embedding_length": ("u32", cfg.hidden_size),
        "feed_forward_length": ("[i32]", ffw) if cfg.use_double_wide_mlp else ("u32", cfg.intermediate_size),
        "attention.head_count": ("u32", cfg.num_attention_heads),
        "attention.head_count_kv": ("[i32]", heads) if len(set(heads)) > 1 else ("u32", heads[0]),
        "rope.freq_base": ("f32", cfg.rope_full.theta),
        "rope.freq_base_swa": ("f32", cfg.rope_sliding.theta),
        "attention.layer_norm_rms_epsilon": ("f32", cfg.rms_norm_eps),
        "attention.key_length": ("u32", full),
        "attention.value_length": ("u32", full),
        "final_logit_softcapping": ("f32", cfg.final_logit_softcapping),
        "attention.sliding_window": ("u32", cfg.sliding_window),
        "attention.shared_kv_layers": ("u32", cfg.num_kv_shared_layers),
        "embedding_length_per_layer_input": ("u32", cfg.hidden_size_per_layer_input),
        "attention.sliding_window_pattern": ("[bool]", [kind == "sliding" for kind in cfg.layer_kinds]),
        "attention.key_length_swa": ("u32", sliding),
        "attention.value_length_swa": ("u32", sliding),
        "rope.dimension_count": ("u32", full),
        "rope.dimension_count_swa": ("u32", sliding),
    }
    if cfg.final_logit_softcapping is None:
        del values["final_logit_softcapping"]
    if cfg.num_experts:
        values["expert_count"] = ("u32", cfg.num_experts)
        values["expert_used_count"] = ("u32", cfg.top_k_experts)
        values["expert_feed_forward_length"] = ("u32", cfg.moe_intermediate_size)
    return {f"{ARCHITECTURE}.{key}": Value(*value) for key, value in values.items()}


def config_of(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], frequencies: np.ndarray, where: str
) -> ModelConfig:
    """The model that a file describes: keys, plus what only its tensors say (vocabulary, K = V, rotating share).

    Raises:
      UserError: another architecture, a key missing or of the wrong type, or layers that are no Gemma 4's.
    """
    architecture = metadata.get("general.architecture", Value("str", None)).value
    if architecture != ARCHITECTURE:
        raise UserError(f"{where} is a {architecture!r} model; wanted general.architecture={ARCHITECTURE!r}.")

    def get(key: str, kinds: type | tuple[type, ...], default: Any = ...) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{key}")
        found = default if value is None else value.value
        if found is not default and not isinstance(found, kinds):
            found = ...
        if found is ...:
            raise UserError(f"{where} has no usable key {ARCHITECTURE}.{key}; it is no complete Gemma 4.")
        return found

    layers, number = get("block_count", int), (int, float)
    pattern = get("attention.sliding_window_pattern", list)
    if len(pattern) != layers or not layers or all(pattern):
        raise UserError(
            f"{where} gives {len(pattern)} layers a kind of {layers}, or no full one; no Gemma 4 is like that."
        )
    heads = get("attention.head_count_kv", (int, list))
    heads = heads if isinstance(heads, list) else [heads] * layers
    ffw = get("feed_forward_length", (int, list))
    ffw = ffw if isinstance(ffw, list) else [ffw] * layers
    if len(heads) != layers or len(ffw) != layers or True not in pattern:
        raise UserError(f"{where} lists heads or widths for another number of layers than its {layers}.")
    token_embd, full = shapes.get("token_embd.weight"), pattern.index(False)
    if token_embd is None:
        raise UserError(f"{where} has no token_embd.weight; is it a vocabulary, an adapter or a part of a split file?")
    rotating = float(np.count_nonzero(frequencies < UNROTATED / 2)) / max(len(frequencies), 1)
    experts = get("expert_count", int, 0)
    cfg = ModelConfig(
        hidden_size=get("embedding_length", int),
        num_hidden_layers=layers,
        layer_period=full + 1,
        num_attention_heads=get("attention.head_count", int),
        num_key_value_heads=heads[pattern.index(True)],
        num_global_key_value_heads=heads[full],
        intermediate_size=ffw[0],
        sliding_window=get("attention.sliding_window", int),
        max_position_embeddings=get("context_length", int),
        vocab_size=token_embd[0],
        head_dim=get("attention.key_length_swa", int),
        global_head_dim=get("attention.key_length", int),
        num_kv_shared_layers=get("attention.shared_kv_layers", int, 0),
        use_double_wide_mlp=ffw[-1] != ffw[0],
        hidden_size_per_layer_input=get("embedding_length_per_layer_input", int),
        vocab_size_per_layer_input=shapes.get("per_layer_token_embd.weight", token_embd)[0],
        attention_k_eq_v=f"blk.{full}.attn_v.weight" not in shapes,
        num_experts=experts,
        top_k_experts=get("expert_used_count", int, 0),
        moe_intermediate_size=get("expert_feed_forward_length", int, 0),
        rope_sliding=Rope(float(get("rope.freq_base_swa", number, 10_000.0))),
        rope_full=Rope(float(get("rope.freq_base", number)), rotating),
        rms_norm_eps=round(float(get("attention.layer_norm_rms_epsilon", number)), 12),
        final_logit_softcapping=get("final_logit_softcapping", number, None),
        # Only images are attended to both ways; the large models are trained so.
        use_bidirectional_attention=None if get("embedding_length_per_layer_input", int) else "vision",
    )
    cfg = dataclasses.replace(cfg, **_special_ids(metadata))
    if metadata_of(cfg)[f"{ARCHITECTURE}.attention.sliding_window_pattern"].value != pattern:
        raise UserError(f"{where} mixes layer kinds in an order that no Gemma 4 has.")
    return cfg


def expected(cfg: ModelConfig) -> dict[str, str]:
    """GGUF name -> name in `names.table`, of every tensor but `rope_freqs`."""
    return {gguf_name(name): name for name in names.table(cfg)}


def _special_ids(metadata: Metadata) -> dict[str, Any]:
    keys = {"pad_token_id": "padding_token_id", "eos_token_id": "eos_token_id", "bos_token_id": "bos_token_id"}
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in keys.items()}
    return {ours: value.value for ours, value in found.items() if value is not None}

"""google-deepmind/gemma's side, in an environment with gemma (Python 3.12): `PYTHON -m benchmarks.peer_gemma CHECKPOINT`."""
# pyright: reportMissingImports=false

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gemma.gm.nn.gemma4 import _config, _modules, _transformer
from safetensors.numpy import load_file

from benchmarks.jax_peer import train


def main(checkpoint: Path) -> None:
    """Its model with our weights; cross-entropy of its logits, as its own loss has it."""
    model, params, version = load(checkpoint)
    tokens = jnp.asarray(np.load(checkpoint / "tokens.npy"))
    train(lambda params: model.apply({"params": params}, tokens).logits, params, tokens, version)


def load(checkpoint: Path) -> tuple[Any, Any, str]:
    """Its model for a float32 checkpoint, the weights in its tree, and what it calls itself."""
    hf = json.loads((checkpoint / "config.json").read_text())
    model = _transformer.Transformer(config=_configuration(hf), tokens="batch.input", dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = _parameters(shapes, load_file(checkpoint / "model.safetensors"), hf)
    return model, params, f"gemma {importlib.metadata.version('gemma')}"


def _configuration(hf: dict[str, Any]) -> Any:
    full = next(iter(hf["per_layer_config"].values()))
    kinds = {
        "sliding_attention": _modules.AttentionType.LOCAL_SLIDING,
        "full_attention": _modules.AttentionType.GLOBAL,
    }
    more: dict[str, Any] = {}
    if hf["num_kv_shared_layers"]:
        share = hf["num_kv_shared_layers"] / hf["num_hidden_layers"]
        more["kv_cache_sharing_config"] = _config.KVCacheSharingConfig(
            frac_shared_layers=share, share_global=True, share_local=True
        )
    if hf["enable_moe_block"]:
        more |= {
            "enable_moe": True,
            "num_experts": hf["num_experts"],
            "expert_dim": hf["moe_intermediate_size"],
            "top_k_experts": hf["top_k_experts"],
            "moe_dense_hidden_dim": hf["intermediate_size"],
        }
    return _config.TransformerConfig(
        num_embed=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        num_global_kv_heads=full.get("num_key_value_heads", hf["num_key_value_heads"]),
        global_key_size=full["head_dim"],
        final_logit_softcap=hf["final_logit_softcapping"],
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=tuple(kinds[name] for name in hf["layer_types"]),
        sliding_window_size=hf["sliding_window"],
        k_eq_v_global=hf["attention_k_eq_v"],
        global_rope_proportion=0.25,
        local_rope_proportion=1.0,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        per_layer_input_dim=hf["hidden_size_per_layer_input"] or 0,
        **more,
    )


_NAMES = {
    "embedder.input_embedding": "embed_tokens.weight",
    "embedder.per_layer_embeddings": "embed_tokens_per_layer.weight",
    "embedder.per_layer_model_projection.w": "per_layer_model_projection.weight",
    "embedder.per_layer_projection_norm.scale": "per_layer_projection_norm.weight",
    "final_norm.scale": "norm.weight",
    "attn.attn_vec_einsum.w": "self_attn.o_proj.weight",
    "attn.q_einsum.w": "self_attn.q_proj.weight",
    "attn.k_einsum.w": "self_attn.k_proj.weight",
    "attn.query_norm.scale": "self_attn.q_norm.weight",
    "attn.key_norm.scale": "self_attn.k_norm.weight",
    "mlp.linear": "mlp.down_proj.weight",
    "mlp2.linear": "mlp.down_proj.weight",
    "mlp.linear.w": "experts.down_proj",
    "mlp.gating_einsum.w": "experts.gate_up_proj",
    "mlp.per_expert_scale": "router.per_expert_scale",
    "mlp.router_scale": "router.scale",
    "mlp.router_logits.w": "router.proj.weight",
    "per_layer_input_gate.w": "per_layer_input_gate.weight",
    "per_layer_projection.w": "per_layer_projection.weight",
    "pre_attention_norm.scale": "input_layernorm.weight",
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "pre_ffw_norm.scale": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.scale": "post_feedforward_layernorm.weight",
    "post_ffw1_norm.scale": "post_feedforward_layernorm_1.weight",
    "post_ffw2_norm.scale": "post_feedforward_layernorm_2.weight",
    "pre_ffw2_norm.scale": "pre_feedforward_layernorm_2.weight",
    "post_per_layer_input_norm.scale": "post_per_layer_input_norm.weight",
    "skip_scale": "layer_scalar",
}


def _parameters(shapes: Any, tensors: dict[str, np.ndarray], hf: dict[str, Any]) -> Any:
    """The tensors in its tree. A layer that shares keys and values has some of its own there, which nothing reads: zeros."""

    def find(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        layer, _, name = jax.tree_util.keystr(path, simple=True, separator=".").partition(".")
        prefix = f"model.layers.{layer.removeprefix('layer_')}." if layer.startswith("layer_") else "model."
        name = name if layer.startswith("layer_") else f"{layer}.{name}"
        parts = [prefix + part for part in _parts(name)]
        if any(part not in tensors for part in parts):
            if "self_attn.k" not in parts[0]:
                raise KeyError(parts)
            return jnp.zeros(wanted.shape, jnp.float32)
        return jnp.asarray(_shaped(name, [tensors[part] for part in parts], wanted.shape, hf))

    return jax.tree_util.tree_map_with_path(find, shapes)


def _parts(name: str) -> list[str]:
    if name == "attn.kv_einsum.w":
        return ["self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    if name in ("mlp.gating_einsum", "mlp2.gating_einsum"):
        return ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return [_NAMES[name]]


def _shaped(name: str, given: list[np.ndarray], shape: tuple[int, ...], hf: dict[str, Any]) -> np.ndarray:
    """Ours are [outputs, inputs]."""
    if name == "attn.kv_einsum.w":
        return np.stack([x.reshape(shape[1], shape[3], shape[2]).swapaxes(1, 2) for x in given])
    if len(given) == 2:
        return np.stack(given)
    x = given[0]
    if name in ("attn.q_einsum.w", "attn.k_einsum.w"):  # [heads, width, head dim]
        return x.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2)
    if name in ("mlp.linear", "mlp2.linear", "per_layer_input_gate.w", "per_layer_projection.w", "mlp.router_logits.w"):
        return x.T
    if name in ("attn.attn_vec_einsum.w", "embedder.per_layer_model_projection.w"):
        return x.T.reshape(shape)
    if name == "mlp.linear.w":
        return x.swapaxes(1, 2)
    return x.reshape(shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tunix's side, in an environment with google-tunix (Python 3.12): `PYTHON -m benchmarks.peer_tunix CHECKPOINT`."""
# pyright: reportMissingImports=false

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file
from tunix.models.gemma4 import model as tunix_model
from tunix.models.gemma4.params_safetensors import create_model_from_safe_tensors

from benchmarks.jax_peer import train


def main(checkpoint: Path) -> None:
    """Tunix's own loader, model and causal mask; cross-entropy as its trainer has it."""
    model = load(checkpoint)
    graph, params = nnx.split(model)
    tokens = jnp.asarray(np.load(checkpoint / "tokens.npy"))
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length)[None], (rows, 1))
    mask = jnp.tile(jnp.tril(jnp.ones((length, length), bool))[None], (rows, 1, 1))

    def logits(params):
        return nnx.merge(graph, params)(tokens, positions=positions, attention_mask=mask)[0]

    train(logits, params, tokens, version())


def version() -> str:
    """What it calls itself."""
    return f"Tunix {importlib.metadata.version('google-tunix')}"


def load(checkpoint: Path) -> Any:
    """The checkpoint in float32. Tunix's loader wants tensors without the prefix of text-only files."""
    hf = json.loads((checkpoint / "config.json").read_text())
    full = next(iter(hf["per_layer_config"].values()))
    kind = {"sliding_attention": "LOCAL_SLIDING", "full_attention": "GLOBAL"}
    experts = {}
    if hf["enable_moe_block"]:
        experts = {
            "enable_moe": True,
            "num_experts": hf["num_experts"],
            "expert_dim": hf["moe_intermediate_size"],
            "num_experts_per_tok": hf["top_k_experts"],
            "moe_dense_hidden_dim": hf["intermediate_size"],
        }
    config = tunix_model.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        num_embed=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        num_global_kv_heads=full.get("num_key_value_heads", hf["num_key_value_heads"]),
        global_key_size=full["head_dim"],
        sliding_window_size=hf["sliding_window"],
        per_layer_input_dim=hf["hidden_size_per_layer_input"] or 0,
        frac_shared_layers=hf["num_kv_shared_layers"] / hf["num_hidden_layers"],
        k_eq_v_global=hf["attention_k_eq_v"],
        attention_pattern=tuple(getattr(tunix_model.AttentionType, kind[name]) for name in hf["layer_types"]),
        **experts,
    )
    tensors = load_file(checkpoint / "model.safetensors")
    shared = range(hf["num_hidden_layers"] - hf["num_kv_shared_layers"], hf["num_hidden_layers"])
    for layer in shared:  # Tunix keeps keys and values, which nothing reads, where they come from another layer
        own = next(n for n in range(shared.start) if hf["layer_types"][n] == hf["layer_types"][layer])
        for part in ("k_proj", "v_proj", "k_norm"):
            name = "model.layers.{}.self_attn." + f"{part}.weight"
            tensors[name.format(layer)] = np.zeros_like(tensors[name.format(own)])
    with tempfile.TemporaryDirectory() as directory:
        save_file({name.removeprefix("model."): x for name, x in tensors.items()}, f"{directory}/model.safetensors")
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        model = create_model_from_safe_tensors(directory, config, mesh, dtype=jnp.float32)
    # To where a step's results are, or the second step compiles again.
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.device_put(params, jax.devices()[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

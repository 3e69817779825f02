"""Writes a tiny checkpoint in which every tensor is random, so no forgotten factor hides behind a default of 1 or 0.

Values are drawn from a NumPy generator seeded by (seed, tensor name), rounded to bfloat16 and stored as bfloat16, like
the published files: a float32 load is exact, and so is a bfloat16 export of it.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from structures import Tiny, to_old_spelling
from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model_class(tiny: Tiny) -> type[Gemma4ForCausalLM] | type[Gemma4ForConditionalGeneration]:
    """Returns the transformers class whose names the fixture's file has."""
    return Gemma4ForConditionalGeneration if tiny.is_multimodal else Gemma4ForCausalLM


def random_values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Returns a random bfloat16 tensor whose size keeps the signal healthy; depends on nothing but the arguments.

    Logits reach a standard deviation of about 4 (embedding 0.5, final norm about 1, width 64) and attention scores one
    of about 1 to 1.5 (q and k norms about 0.5), so neither the soft cap nor the softmax saturates.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape)
    uniform = rng.uniform(0.0, 1.0, shape)
    leaf, parent = name.split(".")[-1], name.split(".")[-2]
    if leaf == "layer_scalar":
        value = 0.3 + 0.9 * uniform
    elif leaf in ("input_min", "output_min"):
        value = -1.0 - 2.0 * uniform
    elif leaf in ("input_max", "output_max"):
        value = 1.0 + 2.0 * uniform
    elif parent in ("q_norm", "k_norm"):
        value = 0.35 + 0.35 * uniform
    elif leaf in ("scale", "per_expert_scale"):
        value = 0.5 + uniform
    elif leaf in ("std_bias", "per_dim_scale", "bias"):
        value = 0.3 * normal
    elif parent == "embed_tokens":
        value = 0.5 * normal
    elif parent == "embed_tokens_per_layer":
        value = 0.18 * normal
    elif name.endswith("router.proj.weight"):
        value = 2.0 * normal
    elif len(shape) == 1:  # every other vector is a norm weight, or std_scale
        value = 1.0 + 0.25 * normal
    else:
        fan_in = shape[-1] if leaf != "weight" or "conv" not in parent else math.prod(shape[1:])
        value = normal / math.sqrt(fan_in)
    return torch.from_numpy(np.asarray(value, np.float32)).to(torch.bfloat16)


def dead_tensors(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Returns k_proj, v_proj and k_norm of the KV-shared layers: in early published files, in no model; [] if none."""
    if not tiny.dead_shared_kv:
        return {}
    config = tiny.config().get_text_config()
    prefix = "model.language_model." if tiny.is_multimodal else "model."
    tensors = {}
    for layer in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        geometry = config.per_layer_config[layer]
        rows = geometry.num_key_value_heads * geometry.head_dim
        shapes = {
            "k_proj.weight": (rows, config.hidden_size),
            "v_proj.weight": (rows, config.hidden_size),
            "k_norm.weight": (geometry.head_dim,),
        }
        for leaf, shape in shapes.items():
            name = f"{prefix}layers.{layer}.self_attn.{leaf}"
            tensors[name] = random_values(name, shape, tiny.weight_seed)
    return tensors


def write_checkpoint(tiny: Tiny, directory: Path) -> None:
    """Writes config.json and bfloat16 safetensors (one file, or shards with an index) into `directory`."""
    model = model_class(tiny)(tiny.config()).to(torch.bfloat16)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name != "lm_head.weight":  # the same memory as embed_tokens
                tensor.copy_(random_values(name, tuple(tensor.shape), tiny.weight_seed))
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.safetensors*"):
        stale.unlink()
    model.save_pretrained(directory, max_shard_size=tiny.max_shard_size)
    (directory / "generation_config.json").unlink()
    if extra := dead_tensors(tiny):
        save_file({**load_file(directory / WEIGHTS), **extra}, directory / WEIGHTS, metadata={"format": "pt"})
    if tiny.old_spelling:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(to_old_spelling(config), indent=2) + "\n")
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a checkpoint directory, sharded or not, under its name in the file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load_model(tiny: Tiny, directory: Path, attention: str = "eager") -> torch.nn.Module:
    """Returns the checkpoint as transformers loads it, in float32, experts in the plain loop implementation.

    `attention` is "eager" or "sdpa" and applies to the text model only (an audio tower refuses sdpa).
    """
    implementation = {"": "eager", "text_config": attention, "vision_config": "eager", "audio_config": "eager"}
    model = model_class(tiny).from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=implementation if tiny.is_multimodal else attention,
        experts_implementation="eager",
    )
    return model.eval()


def text_model(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the Gemma4TextModel inside either class."""
    return model.model.language_model if hasattr(model.model, "language_model") else model.model

"""How much work a training step is, and how fast the device could do it."""

import resource
import sys
from collections.abc import Mapping

import jax

from gemma4_jax import chips
from gemma4_jax.config import LayerKind, ModelConfig, Stack
from gemma4_jax.model.lora import MARK, TEXT_PARTS


def flops_per_token(cfg: ModelConfig, seq_len: int, trained: Mapping[str, int] | None = None) -> float:
    """Model FLOPs of one trained token in the decoder: nothing recomputed, causal halves not counted.

    What the towers do grows with pictures and sounds, not with tokens: `train.tower_flops`.

    A forward pass; as much again for the gradients of inputs, and of attention for those of its other operand; and 2 for each
    matrix weight whose own gradient is made: three forward passes' worth in all where everything is trained (6 N D), about two
    of them (4 N D) of what is frozen. The gradient is taken to pass all layers, whichever are trained. An adapter counts 6 for
    each of its numbers, as a product beside its weight.

    `trained`: sizes of the parameters that move, by name; None: all of them.
    """
    forward = forward_flops(cfg, seq_len / 2)
    if trained is None:
        return 3.0 * forward
    attention = forward - 2.0 * _matrices(cfg)
    products = {name: size * _share_used(cfg, name) for name, size in trained.items()}
    weights = sum(size for name, size in products.items() if name.endswith(".w"))
    adapters = sum(size for name, size in products.items() if MARK in name)
    return 2.0 * forward + attention + 2.0 * weights + 6.0 * adapters


def _share_used(cfg: ModelConfig, name: str) -> float:
    """Of a parameter's numbers, those that one token multiplies with: none of a looked-up table and of the towers."""
    if name == "per_layer.table.w" or not (name == "embed.w" or name.startswith(TEXT_PARTS)):
        return 0.0
    return cfg.top_k_experts / cfg.num_experts if ".experts." in name else 1.0


def forward_flops(cfg: ModelConfig, keys: float, head: bool = True) -> float:
    """Model FLOPs of a token's forward pass whose queries see `keys` tokens on full layers.

    2 per weight of every matmul the token passes (its own experts only, the head unless it is left out, no lookups), and
    4 * N * H per key its queries see, at most the window on sliding layers.
    """
    attention = 0.0
    for stack in cfg.stacks:
        for kind, layers in _layers(stack).items():
            seen = min(cfg.window(kind) or keys, keys)
            attention += layers * 4 * cfg.num_attention_heads * cfg.head_size(kind) * seen
    return 2 * _matrices(cfg, head) + attention


def _matrices(cfg: ModelConfig, head: bool = True) -> int:
    """Weights that a token is multiplied with."""
    width = cfg.hidden_size
    weights = width * cfg.vocab_size if head else 0
    if cfg.hidden_size_per_layer_input:
        weights += width * cfg.num_hidden_layers * cfg.hidden_size_per_layer_input
    for stack in cfg.stacks:
        for kind, layers in _layers(stack).items():
            projections = 2 * cfg.num_attention_heads
            if stack.owns_kv:
                projections += cfg.kv_heads(kind) * (1 if cfg.k_is_v(kind) else 2)
            layer = width * cfg.head_size(kind) * projections + 3 * width * stack.ffw
            layer += width * cfg.num_experts + 3 * width * cfg.moe_intermediate_size * cfg.top_k_experts
            layer += 2 * width * cfg.hidden_size_per_layer_input
            weights += layers * layer
    return weights


def _layers(stack: Stack) -> dict[LayerKind, int]:
    return {"sliding": stack.blocks * stack.sliding, "full": stack.blocks}


def peak_flops(devices: int) -> float | None:
    """bfloat16 FLOP/s of so many devices together; None where the kind is not in the table (a CPU)."""
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices


def peak_memory() -> int:
    """Most bytes that were in use so far on the fullest device of this process; of a CPU's, what the process took."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max(each.get("peak_bytes_in_use", 0) for each in stats)
    if used:
        return used
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

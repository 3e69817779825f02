"""How much work a training step is, and how fast the device could do it."""

import resource
import sys

import jax

from gemma4_jax import chips
from gemma4_jax.config import LayerKind, ModelConfig


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one trained token: three forward passes' worth, nothing recomputed, causal halves not counted."""
    return 3.0 * forward_flops(cfg, seq_len / 2)


def forward_flops(cfg: ModelConfig, keys: float, head: bool = True) -> float:
    """Model FLOPs of a token's forward pass whose queries see `keys` tokens on full layers.

    2 per weight of every matmul the token passes (its own experts only, the head unless it is left out, no lookups), and
    4 * N * H per key its queries see, at most the window on sliding layers.
    """
    width = cfg.hidden_size
    weights = width * cfg.vocab_size if head else 0
    attention = 0.0
    if cfg.hidden_size_per_layer_input:
        weights += width * cfg.num_hidden_layers * cfg.hidden_size_per_layer_input
    for stack in cfg.stacks:
        counts: dict[LayerKind, int] = {"sliding": stack.blocks * stack.sliding, "full": stack.blocks}
        for kind, layers in counts.items():
            size = cfg.head_size(kind)
            projections = 2 * cfg.num_attention_heads
            if stack.owns_kv:
                projections += cfg.kv_heads(kind) * (1 if cfg.k_is_v(kind) else 2)
            layer = width * size * projections + 3 * width * stack.ffw
            layer += width * cfg.num_experts + 3 * width * cfg.moe_intermediate_size * cfg.top_k_experts
            layer += 2 * width * cfg.hidden_size_per_layer_input
            weights += layers * layer
            seen = min(cfg.window(kind) or keys, keys)
            attention += layers * 4 * cfg.num_attention_heads * size * seen
    return 2 * weights + attention


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

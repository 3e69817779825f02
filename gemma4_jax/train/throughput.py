"""How much work a training step is, and how fast the device could do it."""

import jax

from gemma4_jax.config import LayerKind, ModelConfig

# Dense bfloat16 FLOP/s of one JAX device, by device_kind. Cloud TPU system architecture pages (v4, v5e, v5p, v6e;
# Ironwood 4,614 TFLOP/s float8 = 2,307 bfloat16 a chip, which JAX shows as two devices); NVIDIA H100 and A100 data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one trained token: three forward passes' worth, nothing recomputed, causal halves not counted.

    2 per weight of every matmul the token passes (its own experts only, the head, no lookups), and 4 * N * H per key
    its queries see: on average half the sequence on full layers, at most the window on sliding ones.
    """
    width = cfg.hidden_size
    weights = width * cfg.vocab_size
    attention = 0.0
    if cfg.hidden_size_per_layer_input:
        weights += width * cfg.num_hidden_layers * cfg.hidden_size_per_layer_input
    for stack in cfg.stacks:
        counts: dict[LayerKind, int] = {"sliding": stack.blocks * stack.sliding, "full": stack.blocks}
        for kind, layers in counts.items():
            head = cfg.head_size(kind)
            projections = 2 * cfg.num_attention_heads
            if stack.owns_kv:
                projections += cfg.kv_heads(kind) * (1 if cfg.k_is_v(kind) else 2)
            layer = width * head * projections + 3 * width * stack.ffw
            layer += width * cfg.num_experts + 3 * width * cfg.moe_intermediate_size * cfg.top_k_experts
            layer += 2 * width * cfg.hidden_size_per_layer_input
            weights += layers * layer
            seen = min(cfg.window(kind) or seq_len, seq_len / 2)
            attention += layers * 4 * cfg.num_attention_heads * head * seen
    return 3.0 * (2 * weights + attention)


def peak_flops() -> float | None:
    """bfloat16 FLOP/s of all devices together; None where the kind is not in the table (a CPU)."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()

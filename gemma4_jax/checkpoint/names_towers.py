"""The towers' half of the table of names: parameter -> Hugging Face tensor, layer by layer.

Source: transformers 5.23, models/gemma4/modeling_gemma4.py.
"""

VISION, AUDIO = "model.vision_tower.", "model.audio_tower."
EMBED_VISION, EMBED_AUDIO = "model.embed_vision.", "model.embed_audio."
PREFIXES = (VISION, AUDIO, EMBED_VISION, EMBED_AUDIO)

BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def _clipped(ours: str, theirs: str) -> dict[str, str]:
    """A linear map and its bounds."""
    bounds = {f"{ours}.{bound}": f"{theirs}.{bound}" for bound in BOUNDS}
    return {f"{ours}.linear.w": f"{theirs}.linear.weight"} | bounds


TOP = {
    "vision.patch.w": VISION + "patch_embedder.input_proj.weight",
    "vision.positions": VISION + "patch_embedder.position_embedding_table",
    "vision.std_bias": VISION + "std_bias",
    "vision.std_scale": VISION + "std_scale",
    "vision_projection.linear.w": EMBED_VISION + "embedding_projection.weight",
    "audio.subsample_1.conv.w": AUDIO + "subsample_conv_projection.layer0.conv.weight",
    "audio.subsample_1.scale": AUDIO + "subsample_conv_projection.layer0.norm.weight",
    "audio.subsample_2.conv.w": AUDIO + "subsample_conv_projection.layer1.conv.weight",
    "audio.subsample_2.scale": AUDIO + "subsample_conv_projection.layer1.norm.weight",
    "audio.start.w": AUDIO + "subsample_conv_projection.input_proj_linear.weight",
    "audio.end.w": AUDIO + "output_proj.weight",
    "audio.end_bias": AUDIO + "output_proj.bias",
    "audio_projection.linear.w": EMBED_AUDIO + "embedding_projection.weight",
}

VISION_LAYER = {
    "pre_attention_norm.scale": "input_layernorm.weight",
    **_clipped("attention.q", "self_attn.q_proj"),
    **_clipped("attention.k", "self_attn.k_proj"),
    **_clipped("attention.v", "self_attn.v_proj"),
    **_clipped("attention.o", "self_attn.o_proj"),
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "pre_ffw_norm.scale": "pre_feedforward_layernorm.weight",
    **_clipped("gate", "mlp.gate_proj"),
    **_clipped("up", "mlp.up_proj"),
    **_clipped("down", "mlp.down_proj"),
    "post_ffw_norm.scale": "post_feedforward_layernorm.weight",
}

AUDIO_LAYER = {
    f"{ours}.{part}": f"{theirs}.{name}"
    for ours, theirs in (("first", "feed_forward1"), ("second", "feed_forward2"))
    for part, name in {
        "pre_norm.scale": "pre_layer_norm.weight",
        **_clipped("up", "ffw_layer_1"),
        **_clipped("down", "ffw_layer_2"),
        "post_norm.scale": "post_layer_norm.weight",
    }.items()
} | {
    "pre_attention_norm.scale": "norm_pre_attn.weight",
    **_clipped("attention.q", "self_attn.q_proj"),
    **_clipped("attention.k", "self_attn.k_proj"),
    **_clipped("attention.v", "self_attn.v_proj"),
    **_clipped("attention.o", "self_attn.post"),
    "attention.relative_k.w": "self_attn.relative_k_proj.weight",
    "attention.per_dim_scale": "self_attn.per_dim_scale",
    "post_attention_norm.scale": "norm_post_attn.weight",
    "conv.pre_norm.scale": "lconv1d.pre_layer_norm.weight",
    **_clipped("conv.start", "lconv1d.linear_start"),
    "conv.conv.w": "lconv1d.depthwise_conv1d.weight",
    "conv.conv_norm.scale": "lconv1d.conv_norm.weight",
    **_clipped("conv.end", "lconv1d.linear_end"),
    "out_norm.scale": "norm_out.weight",
}

LAYERS = {"vision": (VISION + "encoder.layers.", VISION_LAYER), "audio": (AUDIO + "layers.", AUDIO_LAYER)}
"""Tower -> prefix of its layers' tensors, and their names."""

KERNELS = ("conv.w",)
"""Ends of the parameters that are kernels of convolutions: files keep the inputs' dims apart, [out, in, height, width]."""


def is_tower(parameter: str) -> bool:
    """Whether a parameter belongs to a tower or its projection."""
    return parameter.split(".", 1)[0] in ("vision", "audio", "vision_projection", "audio_projection")


def places(parameter: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names of one tower parameter's tensors and the index of each; layers are stacked in front."""
    if parameter in TOP:
        return [(TOP[parameter], ())]
    tower, _, rest = parameter.split(".", 2)
    prefix, names = LAYERS[tower]
    return [(f"{prefix}{layer}.{names[rest]}", (layer,)) for layer in range(shape[0])]


def file_shape(parameter: str, own: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a tower tensor in a file where it is neither that of our vector nor that of a plain matrix."""
    if parameter.endswith(BOUNDS):
        return ()
    if parameter.endswith(KERNELS):
        *inputs, out = own
        return (out, 1, *inputs) if len(inputs) == 1 else (out, *inputs)
    return None


def order(name: str) -> tuple[int, int, int]:
    """Towers one after the other: what stands before the layers, the layers in order, the rest."""
    tower = next(i for i, prefix in enumerate((VISION, EMBED_VISION, AUDIO, EMBED_AUDIO)) if name.startswith(prefix))
    for prefix, names in LAYERS.values():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            return tower, int(layer), list(names.values()).index(rest)
    top = list(TOP.values()).index(name)
    return tower, (1 << 30) if "output_proj" in name or "std_" in name else -1, top

"""The towers as a GGUF file of their own, which llama.cpp takes beside the text model's: `--mmproj`.

Weights are written in a plain type: of towers on a grid (`quant.cover`) the values that the grid holds. Source: llama.cpp,
conversion/gemma.py (`Gemma4VisionAudioModel`), tools/mtmd/clip-impl.h (names) and tools/mtmd/models/gemma4v.cpp, gemma4a.cpp.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.checkpoint.canvas import beside
from gemma4_jax.checkpoint.export import Outcome, Storage, float_storage, write
from gemma4_jax.checkpoint.ggml_types import F32, float_type
from gemma4_jax.checkpoint.gguf_file import Metadata, Value, lay_out
from gemma4_jax.checkpoint.names_towers import AUDIO, EMBED_AUDIO, EMBED_VISION, VISION
from gemma4_jax.checkpoint.source import Source
from gemma4_jax.config import ModelConfig
from gemma4_jax.config_media import VisionConfig
from gemma4_jax.errors import UserError
from gemma4_jax.media.sounds import BINS

ARCHITECTURE = "clip"
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}

_TOP = {
    VISION + "patch_embedder.input_proj": "v.patch_embd",
    VISION + "patch_embedder.position_embedding_table": "v.position_embd.weight",
    VISION + "std_bias": "v.std_bias",
    VISION + "std_scale": "v.std_scale",
    EMBED_VISION + "embedding_projection": "mm.input_projection",
    AUDIO + "subsample_conv_projection.layer0.conv": "a.conv1d.0",
    AUDIO + "subsample_conv_projection.layer0.norm": "a.conv1d.0.norm",
    AUDIO + "subsample_conv_projection.layer1.conv": "a.conv1d.1",
    AUDIO + "subsample_conv_projection.layer1.norm": "a.conv1d.1.norm",
    AUDIO + "subsample_conv_projection.input_proj_linear": "a.input_projection",
    AUDIO + "output_proj": "a.pre_encode.out",
    EMBED_AUDIO + "embedding_projection": "mm.a.input_projection",
}
_VISION_LAYER = {
    "input_layernorm": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "ffn_post_norm",
}
_AUDIO_LAYER = {
    "feed_forward1.pre_layer_norm": "ffn_norm",
    "feed_forward1.ffw_layer_1": "ffn_up",
    "feed_forward1.ffw_layer_2": "ffn_down",
    "feed_forward1.post_layer_norm": "ffn_post_norm",
    "feed_forward2.pre_layer_norm": "ffn_norm_1",
    "feed_forward2.ffw_layer_1": "ffn_up_1",
    "feed_forward2.ffw_layer_2": "ffn_down_1",
    "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "norm_pre_attn": "attn_pre_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.post": "attn_out",
    "self_attn.relative_k_proj": "attn_k_rel",
    "self_attn.per_dim_scale": "per_dim_scale.weight",
    "norm_post_attn": "attn_post_norm",
    "lconv1d.pre_layer_norm": "conv_norm",  # llama.cpp swaps these two, when it writes and when it reads
    "lconv1d.linear_start": "conv_pw1",
    "lconv1d.depthwise_conv1d": "conv_dw",
    "lconv1d.conv_norm": "norm_conv",
    "lconv1d.linear_end": "conv_pw2",
    "norm_out": "ln2",
}
_LAYERS = {VISION + "encoder.layers.": ("v", _VISION_LAYER), AUDIO + "layers.": ("a", _AUDIO_LAYER)}
_ENDINGS = re.compile(r"(?:\.linear)?(\.weight|\.bias|\.(?:in|out)put_m(?:in|ax))$")


def mmproj_path(text: Path) -> Path:
    """Where the towers' file stands: `mmproj-NAME.gguf` beside `NAME.gguf`."""
    return text.with_name(f"mmproj-{text.name}")


def mmproj_name(name: str) -> str:
    """llama.cpp's name of a tower's tensor."""
    match = _ENDINGS.search(name)
    stem, ending = (name, "") if match is None else (name[: match.start()], match[1])
    if stem in _TOP:
        return _TOP[stem] + ending
    for prefix, (tower, layer_names) in _LAYERS.items():
        if stem.startswith(prefix):
            layer, _, rest = stem.removeprefix(prefix).partition(".")
            return f"{tower}.blk.{layer}.{layer_names[rest]}{ending}"
    raise ValueError(f"{name} has no name in an mmproj file")


def write_mmproj(source: Source, path: Path, *, dtype: str = "bfloat16", name: str = "gemma4") -> Outcome:
    """Writes the towers and projections of a source, whole or not at all.

    Args:
      source: a checkpoint with towers.
      path: of the file; must not exist.
      dtype: of matrices: float32, bfloat16 or float16. Vectors, kernels, patches and positions are float32.
      name: general.name.

    Raises:
      UserError: the model has no towers; values that are not finite.
    """
    if not source.cfg.is_multimodal:
        raise UserError(f"{source.origin} has no vision or audio tower, so there is no mmproj file to write.")
    text = set(source.text_names())
    towers = [tensor for tensor in source.tensors if tensor not in text]
    storages = {tensor: _storage(source, tensor, dtype) for tensor in towers}
    forms = {target: form for storage in storages.values() for target, form in storage.tensors.items()}
    front, placed = lay_out(_metadata(source.cfg, name, dtype), forms)
    places = {tensor.name: (tensor.start, tensor.size) for tensor in placed.values()}
    with ExitStack() as stack:
        partial = stack.enter_context(beside(path, what="The file"))
        return write(_only(source, towers), storages, {"": (partial, front, places)}, requantise=True)


def _only(source: Source, names: Iterable[str]) -> Source:
    return dataclasses.replace(source, tensors={name: source.tensors[name] for name in names})


def _storage(source: Source, name: str, dtype: str) -> Storage:
    """How one tensor is stored."""
    target, shape = mmproj_name(name), source.tensors[name].shape
    change = _changed(target, source.cfg)
    new_shape = change(np.zeros((1, *shape[1:]), np.float32)).shape[1:] if len(shape) > 1 else ()
    new_shape = (shape[0], *new_shape) if shape else (1,)
    exact = (
        len(new_shape) != 2 or target.startswith(("v.position_embd", "a.conv1d")) or target.endswith("conv_dw.weight")
    )
    kind = F32 if exact else float_type(dtype)
    assert kind.float_dtype is not None
    plain = float_storage(target, kind, kind.float_dtype, new_shape, kind.name)
    pack = plain.pack

    def packed(rows: slice, values: Any) -> Iterable[tuple[str, np.ndarray]]:
        return pack(rows, change(values))

    return Storage(plain.label, plain.tensors, packed, held=plain.held)


def _changed(target: str, cfg: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What llama.cpp wants otherwise than the checkpoint has it, of rows of a tensor."""
    if target == "v.patch_embd.weight":
        assert cfg.vision is not None
        side = cfg.vision.patch_size
        return lambda x: x.reshape(len(x), side, side, 3).transpose(0, 3, 1, 2)
    if target.endswith("per_dim_scale.weight"):
        return lambda x: np.logaddexp(x, np.float32(0)).astype(np.float32)  # softplus
    if target.endswith("conv_dw.weight"):
        return lambda x: x.reshape(len(x), x.shape[-1])
    return lambda x: x


def _metadata(cfg: ModelConfig, name: str, dtype: str) -> Metadata:
    found = {
        "general.architecture": Value("str", ARCHITECTURE),
        "general.type": Value("str", "mmproj"),
        "general.name": Value("str", name),
        "general.file_type": Value("u32", _FILE_TYPES[dtype]),
        "general.quantization_version": Value("u32", 2),
    }
    if cfg.vision is not None:
        found |= _vision(cfg.vision, cfg.hidden_size)
    if cfg.audio is not None:
        ears = cfg.audio
        found |= {
            "clip.has_audio_encoder": Value("bool", True),
            "clip.audio.projector_type": Value("str", "gemma4a"),
            "clip.audio.projection_dim": Value("u32", cfg.hidden_size),
            "clip.audio.embedding_length": Value("u32", ears.hidden_size),
            "clip.audio.feed_forward_length": Value("u32", 4 * ears.hidden_size),
            "clip.audio.block_count": Value("u32", ears.num_hidden_layers),
            "clip.audio.attention.head_count": Value("u32", ears.num_attention_heads),
            "clip.audio.attention.layer_norm_epsilon": Value("f32", ears.rms_norm_eps),
            "clip.audio.num_mel_bins": Value("u32", BINS),
        }
    return found


def _vision(eyes: VisionConfig, width: int) -> Metadata:
    return {
        "clip.has_vision_encoder": Value("bool", True),
        # Without it llama.cpp takes x * sigmoid(1.702 x) in place of the model's GELU; its own converter leaves it out.
        "clip.use_gelu": Value("bool", True),
        "clip.vision.projector_type": Value("str", "gemma4v"),
        "clip.vision.projection_dim": Value("u32", width),
        "clip.vision.image_size": Value("u32", 224),  # wanted, but pictures keep their shape
        "clip.vision.patch_size": Value("u32", eyes.patch_size),
        "clip.vision.embedding_length": Value("u32", eyes.hidden_size),
        "clip.vision.feed_forward_length": Value("u32", eyes.intermediate_size),
        "clip.vision.block_count": Value("u32", eyes.num_hidden_layers),
        "clip.vision.attention.head_count": Value("u32", eyes.num_attention_heads),
        "clip.vision.attention.layer_norm_epsilon": Value("f32", eyes.rms_norm_eps),
        "clip.vision.projector.scale_factor": Value("u32", eyes.pooling_kernel_size),
        "clip.vision.image_mean": Value("[f32]", [0.0, 0.0, 0.0]),
        "clip.vision.image_std": Value("[f32]", [1.0, 1.0, 1.0]),
    }

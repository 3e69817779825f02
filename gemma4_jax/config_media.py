"""The towers of a Gemma 4 model: sizes of eyes and ears, the published ones, and Hugging Face's spelling of them.

Field names are Hugging Face's. Source: transformers 5.23, models/gemma4/configuration_gemma4.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma4_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the ids of its placeholders in the text; the defaults are those of E2B and E4B.

    A soft token is the mean of `pooling_kernel_size` x `pooling_kernel_size` patches of `patch_size` x `patch_size` pixels.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    head_dim: int = 64
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10240
    rope_theta: float = 100.0
    use_clipped_linears: bool = True
    standardize: bool = False
    rms_norm_eps: float = 1e-6
    boi_token_id: int = 255999
    eoi_token_id: int = 258882
    image_token_id: int = 258880
    video_token_id: int = 258884

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise UserError(
                f"vision_config's head_dim={self.head_dim} must be a multiple of 4: half of a head turns by x, half by y."
            )

    @property
    def cell_patches(self) -> int:
        """Patches of one soft token."""
        return self.pooling_kernel_size**2

    @property
    def cell_size(self) -> int:
        """Pixels along a side of one soft token."""
        return self.pooling_kernel_size * self.patch_size

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: rows, columns, colours."""
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The audio tower (E2B, E4B) and the ids of its placeholders in the text."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    subsampling_conv_channels: tuple[int, int] = (128, 32)
    conv_kernel_size: int = 5
    residual_weight: float = 0.5
    attention_chunk_size: int = 12
    attention_context_left: int = 13
    attention_context_right: int = 0
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    use_clipped_linears: bool = True
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    output_proj_dims: int = 1536
    boa_token_id: int = 256000
    eoa_token_id: int = 258883
    audio_token_id: int = 258881

    def __post_init__(self) -> None:
        object.__setattr__(self, "subsampling_conv_channels", tuple(self.subsampling_conv_channels))
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise UserError(
                f"audio_config's hidden_size={self.hidden_size} must be even and divide by "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.attention_context_right or self.attention_context_left != self.attention_chunk_size + 1:
            raise UserError(
                "audio_config must have attention_context_right=0 and attention_context_left=attention_chunk_size+1, as every "
                f"published Gemma 4; got {self.attention_context_right}, {self.attention_context_left} and "
                f"{self.attention_chunk_size}."
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def bands(self) -> int:
        """Frequency bands left after subsampling; Hugging Face computes them from the channels (128 for 128 mel bins)."""
        return self.subsampling_conv_channels[0] // 4


_LARGE_VISION = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    head_dim=72,
    use_clipped_linears=False,
    standardize=True,
)
_TINY_SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32
)
# Ids of the embedded tokenizer (assets/make_tokenizer.py).
_TINY_VISION_IDS: dict[str, Any] = dict(boi_token_id=111, image_token_id=112, eoi_token_id=113, video_token_id=117)
_TINY_VISION = VisionConfig(**_TINY_SIZES, **_TINY_VISION_IDS, position_embedding_size=1024)
_TINY_LARGE_VISION = dataclasses.replace(_TINY_VISION, use_clipped_linears=False, standardize=True)
_TINY_AUDIO = AudioConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    subsampling_conv_channels=(128, 8),
    output_proj_dims=96,
    boa_token_id=114,
    audio_token_id=115,
    eoa_token_id=116,
)

TOWERS: dict[str, dict[str, Any]] = {
    "e2b": {"vision": VisionConfig(), "audio": AudioConfig()},
    "e4b": {"vision": VisionConfig(), "audio": AudioConfig()},
    "26b_a4b": {"vision": _LARGE_VISION},
    "31b": {"vision": _LARGE_VISION},
    "tiny_e2b": {"vision": _TINY_VISION, "audio": _TINY_AUDIO},
    "tiny_e4b": {"vision": _TINY_VISION, "audio": _TINY_AUDIO},
    "tiny_26b_a4b": {"vision": _TINY_LARGE_VISION},
    "tiny_31b": {"vision": _TINY_LARGE_VISION},
}
"""The towers of each variant, as fields of ModelConfig."""

# Of our id fields, those that the file spells otherwise.
_ID_SPELLING = {"eoa_token_id": "eoa_token_index"}
# transformers' default where a file leaves the key out; ours are the published models'.
_HF_DEFAULTS = {"use_clipped_linears": False}
C = TypeVar("C", VisionConfig, AudioConfig)


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `vision` and `audio` of ModelConfig, from a whole model's config.json; absent towers are left out."""
    found: dict[str, Any] = {}
    if config.get("vision_config") is not None:
        found["vision"] = _vision_from_hf(config)
    if config.get("audio_config") is not None:
        found["audio"] = _read(AudioConfig, config["audio_config"], config, "audio_config", {})
    return found


def to_hf(vision: VisionConfig | None, audio: AudioConfig | None) -> dict[str, Any]:
    """What a whole model's config.json says beside `text_config`."""
    out: dict[str, Any] = {"vision_config": None, "audio_config": None}
    if vision is not None:
        sizes, ids = _split(vision)
        theta = sizes.pop("rope_theta")
        out["vision_config"] = {
            "model_type": "gemma4_vision",
            **sizes,
            "num_key_value_heads": vision.num_attention_heads,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "axial", "rope_theta": theta},
        }
        out |= ids
    if audio is not None:
        sizes, ids = _split(audio)
        sizes["subsampling_conv_channels"] = list(audio.subsampling_conv_channels)
        out["audio_config"] = {"model_type": "gemma4_audio", **sizes, "hidden_act": "silu"}
        out |= ids
    return out


def of_json(kind: type[C], fields: Mapping[str, Any] | None) -> C | None:
    """A tower's config from what `dataclasses.asdict` made of it; None stays None."""
    return None if fields is None else kind(**fields)


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    given = config["vision_config"]
    rope = given.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"vision_config has rope_type {rope['rope_type']!r}; wanted 'axial'.")
    heads = given.get("num_attention_heads", VisionConfig.num_attention_heads)
    if given.get("num_key_value_heads", heads) != heads:
        raise UserError(
            f"vision_config has {given['num_key_value_heads']} key/value heads for {heads} query heads; Gemma 4 has as many."
        )
    if given.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"vision_config has the activation {given['hidden_activation']!r}; wanted 'gelu_pytorch_tanh'.")
    theta = rope.get("rope_theta", VisionConfig.rope_theta)
    return _read(VisionConfig, given, config, "vision_config", {**_HF_DEFAULTS, "rope_theta": float(theta)})


def _read(kind: type[C], given: Mapping[str, Any], whole: Mapping[str, Any], where: str, known: dict[str, Any]) -> C:
    """A tower's config: sizes from its own section, ids from the whole file's top level."""
    if not isinstance(given, Mapping):
        raise UserError(f"config.json's {where} must be a mapping, got {type(given).__name__}.")
    fields: dict[str, Any] = dict(known)
    for field in dataclasses.fields(kind):
        source, key = (whole, _ID_SPELLING.get(field.name, field.name)) if _is_id(field.name) else (given, field.name)
        if source.get(key) is not None:
            fields[field.name] = source[key]
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json's {where} cannot be read: {error}") from error


def _split(tower: VisionConfig | AudioConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """Sizes, and ids under the names of the file."""
    fields = {field.name: getattr(tower, field.name) for field in dataclasses.fields(tower)}
    ids = {_ID_SPELLING.get(name, name): value for name, value in fields.items() if _is_id(name)}
    return {name: value for name, value in fields.items() if not _is_id(name)}, ids


def _is_id(name: str) -> bool:
    return name.endswith("_token_id")

"""Models and processors from the settings that name them, checked against each other before anything expensive."""

from pathlib import Path

import jax

from gemma4_jax import assets
from gemma4_jax.checkpoint.load import load, load_config
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.pipeline import DataConfig
from gemma4_jax.errors import UserError
from gemma4_jax.media.frontend import FrontEnd, MediaConfig
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.processor import Processor
from gemma4_jax.quant.activations import check_calibrated
from gemma4_jax.tokenizer import FILE_NAMES
from launch.settings import ModelSection


def model_config(section: ModelSection) -> ModelConfig:
    """What the model will be, before any weight is read or drawn."""
    if section.path is not None:
        cfg = load_config(section.path, section.base)
        return cfg.text_only() if section.text_only else cfg
    assert section.variant is not None
    return ModelConfig.variant(section.variant, **section.overrides)


def make_model(section: ModelSection, seed: int, mesh: jax.sharding.Mesh | None = None) -> Transformer:
    """The model of a checkpoint, or a variant with random weights; its parameters shared out on the mesh."""
    dtype, compute_dtype = section.param_dtype, section.dtype
    if section.path is not None:
        where = {"text_only": section.text_only, "mesh": mesh, "base": section.base}
        model = load(section.path, dtype=dtype, compute_dtype=compute_dtype, **where)
        check_calibrated(model)
        return model
    return init(model_config(section), seed, dtype, compute_dtype=compute_dtype, mesh=mesh)


def make_processor(
    tokenizer: str | None,
    section: ModelSection,
    cfg: ModelConfig,
    media: MediaConfig = MediaConfig(),  # noqa: B008
) -> Processor:
    """The tokenizer named, else the one beside the checkpoint, else the embedded one; with the model's habits, eyes and ears.

    26B and 31B were trained with an empty thought channel in front of answers without a thought, E2B and E4B without.
    """
    beside = None if section.path is None else tokenizer_beside(section.path)
    empty_thought = not cfg.hidden_size_per_layer_input
    processor = Processor.load(tokenizer or beside or assets.TOKENIZER, empty_thought=empty_thought)
    return processor.with_front_end(FrontEnd(cfg.vision, cfg.audio, media))


def tokenizer_beside(checkpoint: str) -> Path | None:
    """The directory with the checkpoint's tokenizer: its own, or one above (a training run keeps it beside its steps)."""
    path = Path(checkpoint)
    if path.suffix == ".gguf" and path.is_file():
        return path  # it carries its own
    homes = (path, path.parent, path.parent.parent)
    return next((home for home in homes if any((home / name).is_file() for name in FILE_NAMES)), None)


def check_agreement(cfg: ModelConfig, processor: Processor, *data: DataConfig | None) -> None:
    """UserError unless tokenizer, model and sequence lengths fit together."""
    if processor.vocab_size != cfg.vocab_size:
        raise UserError(
            f"The tokenizer has {processor.vocab_size} pieces and the model {cfg.vocab_size}: set config.tokenizer to the "
            "model's own, or for a new model config.model.overrides.vocab_size to the tokenizer's."
        )
    for config in data:
        if config is not None and config.seq_len > cfg.max_position_embeddings:
            raise UserError(
                f"data.seq_len={config.seq_len} is beyond the model's context of {cfg.max_position_embeddings} tokens."
            )

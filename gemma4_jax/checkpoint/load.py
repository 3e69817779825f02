"""`load`: a model from whatever file or directory holds one."""

import os
from pathlib import Path

import jax

from gemma4_jax.checkpoint.hf import checkpoint_directory, read_config
from gemma4_jax.checkpoint.placement import Which, default_device
from gemma4_jax.checkpoint.shards import INDEX, SINGLE
from gemma4_jax.checkpoint.source import Source
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import parameter_shardings


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    step: Which = "latest",
) -> Transformer:
    """The model in a Hugging Face directory, a GGUF file, one of our model directories, a training step, or a training run.

    A quantised checkpoint (GGUF; compressed-tensors and mobile directories) gives the weights it decodes to, and the grids they
    lie on, so that more training and new exports are exact; where a file's weights lie on no grid of ours, a log says so.

    Args:
      path: the directory, or a .gguf file.
      dtype: of the parameters; None: as stored.
      compute_dtype: what layers compute in; None: `dtype`, else as stored.
      text_only: leave out the vision and audio towers of a Hugging Face checkpoint, without reading their tensors' bytes.
      mesh: where the parameters go, cut as `sharding.PARAMETERS` says; None: this process's first device.
      step: of a training run: a number, "latest" or "best".

    Raises:
      UserError: the directory is missing, empty, neither kind, or damaged, in one sentence.
    """
    text = os.fspath(path)
    shardings = default_device if mesh is None else parameter_shardings(mesh)
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import load_gguf

        return load_gguf(Path(text), dtype=dtype, compute_dtype=compute_dtype, shardings=shardings)
    if not _is_ours(text):
        from gemma4_jax.checkpoint.quantised import load_directory

        return load_directory(text, dtype=dtype, compute_dtype=compute_dtype, text_only=text_only, shardings=shardings)
    from gemma4_jax.checkpoint import store  # Orbax takes a second to import

    return store.load_model(text, dtype=dtype, compute_dtype=compute_dtype, shardings=shardings, step=step)


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of the model that `load` would load, without reading a weight."""
    text = os.fspath(path)
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import read_gguf

        return read_gguf(Path(text)).cfg
    if not _is_ours(text):
        return read_config(checkpoint_directory(text))
    from gemma4_jax.checkpoint import store

    return store.config_of(store.read_model_meta(text))


def source(path: str | os.PathLike[str], *, text_only: bool = False, step: Which = "latest") -> Source:
    """What `load` would load, tensor by tensor and not in memory; for exports and conversions."""
    text = os.fspath(path)
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import gguf_source

        return gguf_source(Path(text))
    if not _is_ours(text):
        from gemma4_jax.checkpoint.quantised import directory_source

        return directory_source(text, text_only)
    from gemma4_jax.checkpoint import store

    return store.model_source(text, step)


def is_gguf(path: str) -> bool:
    """Whether `path` is a GGUF file, by its name or its first bytes."""
    file = Path(path)
    if "://" in path or not file.is_file():
        return False
    with file.open("rb") as opened:
        return file.suffix == ".gguf" or opened.read(4) == b"GGUF"


def _is_ours(text: str) -> bool:
    """True for an Orbax directory, False for a Hugging Face one (also one that lacks a part: reading it says which)."""
    files: list[str] = []
    if "://" not in text:
        files = [file.name for file in checkpoint_directory(text).iterdir()]
        if SINGLE in files or INDEX in files:
            return False
    from gemma4_jax.checkpoint import steps

    if steps.is_store(text):
        return True
    if "config.json" in files or any(name.endswith(".safetensors") for name in files):
        return False
    raise UserError(
        f"{text} is no checkpoint: wanted config.json with {SINGLE} or {INDEX} (Hugging Face), or a model directory, step "
        "or run of this project."
    )

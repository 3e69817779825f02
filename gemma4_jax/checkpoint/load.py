"""`load`: a model from whatever file or directory holds one."""

import os
from pathlib import Path

import jax

from gemma4_jax.checkpoint.hf import checkpoint_directory, read_config
from gemma4_jax.checkpoint.placement import Shardings, Which, default_device
from gemma4_jax.checkpoint.shards import INDEX, SINGLE
from gemma4_jax.checkpoint.source import Source, of_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import parameter_shardings

PEFT_CONFIG = "adapter_config.json"


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
    merge: bool = True,
) -> Transformer:
    """The model in a Hugging Face directory, a GGUF file, one of our model directories, a training step, or a training run.

    Adapters, in a run of ours or in a PEFT directory, come with their base, which is compared with the one they were trained
    beside.

    A quantised checkpoint (GGUF; compressed-tensors and mobile directories) gives the weights it decodes to, and the grids they
    lie on, so that more training and new exports are exact; where a file's weights lie on no grid of ours, a log says so.

    Args:
      path: the directory, or a .gguf file.
      dtype: of the parameters; None: as stored.
      compute_dtype: what layers compute in; None: `dtype`, else as stored.
      text_only: leave out the vision and audio towers, without reading their tensors' bytes.
      mesh: where the parameters go, cut as `sharding.PARAMETERS` says; None: this process's first device.
      step: of a training run: a number, "latest" or "best".
      base: of adapters: where their base lies; None: where it lay in training.
      merge: add adapters to their weights; else they stay apart, ready for more training.

    Raises:
      UserError: the directory is missing, empty, neither kind, or damaged, in one sentence.
    """
    return read(
        path,
        dtype=dtype,
        compute_dtype=compute_dtype,
        text_only=text_only,
        shardings=default_device if mesh is None else parameter_shardings(mesh),
        step=step,
        base=base,
        merge=merge,
    )


def read(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    shardings: Shardings = default_device,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
    merge: bool = True,
) -> Transformer:
    """As `load`, each parameter where `shardings` says."""
    text = os.fspath(path)
    if is_peft(text):
        from gemma4_jax.checkpoint.peft import load_peft

        return load_peft(
            text, base, dtype=dtype, compute_dtype=compute_dtype, text_only=text_only, shardings=shardings, merge=merge
        )
    if base is not None and not _has_base(text, step):
        raise UserError(f"{text} holds a whole model, which has no base; leave model.base out.")
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import load_gguf

        return load_gguf(Path(text), dtype=dtype, compute_dtype=compute_dtype, shardings=shardings)
    if not _is_ours(text):
        from gemma4_jax.checkpoint.quantised import load_directory

        return load_directory(text, dtype=dtype, compute_dtype=compute_dtype, text_only=text_only, shardings=shardings)
    from gemma4_jax.checkpoint import store  # Orbax takes a second to import

    return store.load_model(
        text,
        dtype=dtype,
        compute_dtype=compute_dtype,
        text_only=text_only,
        shardings=shardings,
        step=step,
        base=base,
        merge=merge,
    )


def load_config(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> ModelConfig:
    """The config of the model that `load` would load, without reading a weight."""
    text = os.fspath(path)
    if is_peft(text):
        from gemma4_jax.checkpoint.peft import base_path

        return load_config(base_path(text, base))
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import read_gguf

        return read_gguf(Path(text)).cfg
    if not _is_ours(text):
        return read_config(checkpoint_directory(text))
    from gemma4_jax.checkpoint import store

    return store.config_of(store.read_model_meta(text))


def source(
    path: str | os.PathLike[str],
    *,
    text_only: bool = False,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
) -> Source:
    """What `load` would load, tensor by tensor and not in memory; for exports and conversions.

    Adapters are merged into their base, which memory then holds as a whole.
    """
    text = os.fspath(path)
    if adapted(text, step):
        return of_model(load(text, text_only=text_only, step=step, base=base), text)
    if is_gguf(text):
        from gemma4_jax.checkpoint.gguf import gguf_source

        return gguf_source(Path(text))
    if not _is_ours(text):
        from gemma4_jax.checkpoint.quantised import directory_source

        return directory_source(text, text_only)
    from gemma4_jax.checkpoint import store

    found = store.model_source(text, step)
    return found.text_only() if text_only else found


def is_peft(path: str) -> bool:
    """Whether `path` is a directory with adapters in PEFT's layout."""
    return "://" not in path and (Path(path) / PEFT_CONFIG).is_file()


def adapted(path: str | os.PathLike[str], step: Which = "latest") -> bool:
    """Whether `path` holds adapters, which need a base."""
    text = os.fspath(path)
    return is_peft(text) or _has_base(text, step)


def _has_base(path: str, step: Which) -> bool:
    """Whether `path` is one of our steps or runs that hold adapters alone."""
    if is_gguf(path) or not _is_ours(path):
        return False
    from gemma4_jax.checkpoint import store

    return "lora" in store.read_model_meta(path, step)


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

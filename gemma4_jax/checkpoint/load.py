"""`load`: a model from whatever directory holds one."""

import os

import jax

from gemma4_jax.checkpoint.hf import checkpoint_directory, load_hf
from gemma4_jax.checkpoint.placement import Shardings, Which, default_device
from gemma4_jax.checkpoint.shards import INDEX, SINGLE
from gemma4_jax.errors import UserError
from gemma4_jax.model.transformer import Transformer


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    shardings: Shardings = default_device,
    step: Which = "latest",
) -> Transformer:
    """The model in a Hugging Face directory, one of our model directories, a training step, or a training run.

    Args:
      path: the directory.
      dtype: of the parameters; None: as stored.
      compute_dtype: what layers compute in; None: `dtype`, else as stored.
      text_only: leave out the vision and audio towers of a Hugging Face checkpoint; without it they are an error.
      shardings: where each parameter goes, from its name and variable.
      step: of a training run: a number, "latest" or "best".

    Raises:
      UserError: the directory is missing, empty, neither kind, or damaged, in one sentence.
    """
    text = os.fspath(path)
    hugging_face = False
    if "://" not in text:
        directory = checkpoint_directory(text)
        if (directory / SINGLE).exists() or (directory / INDEX).exists():
            return load_hf(
                directory, dtype=dtype, compute_dtype=compute_dtype, text_only=text_only, shardings=shardings
            )
        hugging_face = (directory / "config.json").exists() or any(directory.glob("*.safetensors"))
    from gemma4_jax.checkpoint import steps, store  # Orbax takes a second to import

    if steps.is_store(text):
        return store.load_model(text, dtype=dtype, compute_dtype=compute_dtype, shardings=shardings, step=step)
    if hugging_face:
        return load_hf(text)  # its complaint says what is missing
    raise UserError(
        f"{text} is no checkpoint: wanted config.json with {SINGLE} or {INDEX} (Hugging Face), or a model directory, step "
        "or run of this project."
    )

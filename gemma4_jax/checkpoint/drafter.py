"""A drafter's Hugging Face directory (`google/gemma-4-E2B-it-assistant`) to our module."""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.checkpoint.hf import checkpoint_directory, described
from gemma4_jax.checkpoint.mismatch import Mismatch
from gemma4_jax.checkpoint.names import HEAD, LAYER, Entry
from gemma4_jax.checkpoint.placement import default_device, dtype_name
from gemma4_jax.checkpoint.safetensors_io import FLOATS, Tensor
from gemma4_jax.checkpoint.shards import tensors_of
from gemma4_jax.config_drafter import DrafterConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.drafter import Drafter, abstract_drafter
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.parameters import map_arrays, modules, variables

EMBED = "model.embed_tokens.weight"
ORDERING = "masked_embedding.token_ordering"
_TOP = {
    "pre.w": "pre_projection.weight",
    "embed.w": EMBED,
    "final_norm.scale": "model.norm.weight",
    "post.w": "post_projection.weight",
    "centroids.w": "masked_embedding.centroids.weight",
    "token_ordering": ORDERING,
}


def read_drafter_config(path: str | os.PathLike[str]) -> DrafterConfig:
    """The drafter that a directory's config.json describes, without its weights. Raises UserError."""
    return described(checkpoint_directory(Path(path)), DrafterConfig.from_hf, "drafter")


def load_drafter(path: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike | None = None) -> Drafter:
    """The drafter of a Hugging Face directory, for `Sampler(model, drafter=...)`.

    Args:
      path: directory with config.json and safetensors.
      dtype: of the parameters; None: as the embedding is stored. Sampling casts them to what the model decodes in.

    Raises:
      UserError: no drafter, missing, unknown or misshaped tensors, an ordering that is none; one sentence with the names.
    """
    cfg = read_drafter_config(path)
    directory = Path(path)
    stored = tensors_of(directory)
    tree = abstract_drafter(cfg)
    places = {entry.parameter: (name, entry) for name, entry in drafter_table(tree).items()}
    wanted = {name: list(entry.shape) for name, entry in places.values()}
    wrong = Mismatch.between(wanted, {name: list(tensor.shape) for name, tensor in stored.items() if name != HEAD})
    if wrong:
        raise UserError(f"{directory} does not hold the tensors its config.json asks for: {wrong}.")
    _refuse_untied(directory, stored)
    kept = dtype_name(dtype) or FLOATS.get(stored[EMBED].dtype, FLOATS["F32"]).name

    def read(parameter: str, variable: nnx.Variable) -> jax.Array:
        name, entry = places[parameter]
        if name == ORDERING:
            host = _ordering(directory, stored[name].values())
        else:
            host = np.empty(variable.get_value().shape, jnp.dtype(kept))
            entry.view(host)[...] = stored[name].values()
        return jax.device_put(host, default_device(parameter, variable))

    return map_arrays(read, tree)


def drafter_table(drafter: Drafter) -> dict[str, Entry]:
    """Every tensor of a drafter's file -> its place, as `names.table` has it for models."""
    matrices = {f"{path}.w": module for path, module in modules(drafter) if isinstance(module, Weight)}
    found: dict[str, Entry] = {}
    for parameter, variable in variables(drafter).items():
        shape: tuple[int, ...] = variable.get_value().shape
        name, weight = _name(parameter), matrices.get(parameter)
        if weight is None:
            found[name] = Entry(parameter, (), shape or (1,))
        else:
            inputs, outputs = (math.prod(part) for part in (shape[: weight.n_in], shape[weight.n_in :]))
            found[name] = Entry(parameter, (), (outputs, inputs), weight.n_in, weight.n_out)
    return found


def _name(parameter: str) -> str:
    if parameter in _TOP:
        return _TOP[parameter]
    _, index, rest = parameter.split(".", 2)
    return f"model.layers.{index}.{LAYER[rest]}"


def _refuse_untied(directory: Path, stored: dict[str, Tensor]) -> None:
    head = stored.get(HEAD)
    if head is not None and not np.array_equal(head.values(), stored[EMBED].values()):
        raise UserError(f"{directory} stores {HEAD} with other values than {EMBED}; a drafter's head is tied.")


def _ordering(directory: Path, values: np.ndarray) -> np.ndarray:
    if not np.array_equal(np.sort(values), np.arange(values.size)):
        raise UserError(f"{directory}: {ORDERING} must name each of {values.size} tokens once, and does not.")
    return values.astype(np.int32)

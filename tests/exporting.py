"""Random models on grids, for the tests of exports: every array is random, norms and scalars too."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma4_jax.checkpoint.source import ArrayRows, of_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant import policy


def random_model(variant: str, seed: int = 0, **changes: Any) -> Transformer:
    """A float32 model whose arrays are all drawn with numpy: nothing is compiled, no value is a constant."""
    rng = np.random.default_rng(seed)

    def draw(name, variable):
        shape = variable.get_value().shape
        scale = 0.05 if name.endswith(".w") else 0.1
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale + (0 if name.endswith(".w") else 1))

    return map_arrays(draw, abstract(ModelConfig.variant(variant, **changes), "float32"))


def on_policy(model: Transformer, name: str, **options) -> Transformer:
    """The model on a policy's grids, activations left alone."""
    rest = {"activations": "none", "kv_cache": "none"} if name == "mobile" else {}
    return policy.apply(model, policy.QuantConfig(policy=name, **rest, **options))  # pyright: ignore[reportArgumentType]


def forward_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Every tensor by its name in `names.table`, as the forward pass uses it: rounded to its grid, float32."""
    source = of_model(policy.snap(model) if policy.grid_names(model) else model)
    found = {}
    for name, rows in source.tensors.items():
        assert isinstance(rows, ArrayRows)
        array = np.asarray(rows.array)
        found[name] = rows.entry.view(np.ascontiguousarray(array[(*rows.entry.index,)])).astype(np.float32)
    return found

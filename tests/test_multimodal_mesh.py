"""Towers on a mesh: parameters cut where they rest, images over the batch's devices, the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.config import ModelConfig
from gemma4_jax.media.batch import batch_media
from gemma4_jax.media.pieces import ImagePiece, SoundPiece
from gemma4_jax.model.parameters import arrays, map_arrays, variables
from gemma4_jax.model.transformer import abstract
from gemma4_jax.sharding import make_mesh, parameter_shardings, stored_spec

SMALL = dict(num_hidden_layers=10, num_kv_shared_layers=5, hidden_size=64, hidden_size_per_layer_input=16)


def test_every_tower_parameter_is_cut_at_rest_and_no_layer_is():
    """On 8 devices of fsdp only what is too small stays whole."""
    cfg = ModelConfig.variant("e2b", multimodal=True)
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1, 1), ("data", "fsdp", "expert", "context", "tensor"))
    whole = []
    for name, variable in variables(abstract(cfg)).items():
        if not name.startswith(("vision", "audio")):
            continue
        spec = tuple(stored_spec(mesh, variable.dims, variable.shape))
        assert "tower_layers" not in [d for d, axes in zip(variable.dims, spec, strict=False) if axes], name
        if not any(spec):
            whole.append(name)
    assert whole
    assert all(name.split(".")[-1] in ("input_min", "input_max", "output_min", "output_max") for name in whole), whole


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_the_same_numbers_as_on_one_device(axes):
    cfg = ModelConfig.variant("tiny_e2b", multimodal=True, **SMALL)
    assert cfg.vision is not None
    rng = np.random.default_rng(0)

    def fill(name, variable):
        shape = variable.get_value().shape
        if name.endswith(("_min", "_max")):
            return jnp.full(shape, -2.0 if name.endswith("_min") else 2.0)
        return jnp.asarray(rng.standard_normal(shape) * (0.3 if len(shape) < 3 else 0.1), jnp.float32)

    model = map_arrays(fill, abstract(cfg))
    length = 64
    rows = []
    for row in range(4):
        cells = rng.integers(0, 256, (12, cfg.vision.cell_patches, cfg.vision.patch_values)).astype(np.uint8)
        sound = SoundPiece(rng.standard_normal((60, 128)).astype(np.float32))
        rows.append([ImagePiece(cells, 4, 70).at(3 + row), *([sound.at(40)] if row % 2 else [])])
    media = jax.tree.map(jnp.asarray, batch_media(rows, length, cfg.vision, multiple_of=4))
    tokens = jnp.asarray(rng.integers(4, 100, (4, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)

    def loss(model, media):
        return jnp.mean(jnp.square(model.hidden(tokens, positions, None, media, remat="full")))

    value, gradients = quick.jit(jax.value_and_grad(loss))(model, media)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        sharding = parameter_shardings(mesh)
        placed = map_arrays(lambda name, v: jax.device_put(v.get_value(), sharding(name, v)), model)
        value_there, gradients_there = quick.jit(jax.value_and_grad(loss))(placed, media)
    np.testing.assert_allclose(value_there, value, rtol=1e-5)
    theirs = arrays(gradients_there)
    compared = 0
    for name, ours in arrays(gradients).items():
        if name.startswith(("vision", "audio")) and np.linalg.norm(ours) > 0:
            compared += 1
            error = np.linalg.norm(np.asarray(theirs[name]) - np.asarray(ours)) / np.linalg.norm(ours)
            assert error < 1e-3, name
    assert compared > 40

"""Meshes, their choice, and where parameters rest."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.mesh_choice import decoding_axes, training_axes, training_mesh
from gemma4_jax.model.parameters import variables
from gemma4_jax.model.transformer import abstract, init
from gemma4_jax.sharding import AXES, MeshConfig, make_mesh, stored_spec, use_spec

VARIANTS = ("e2b", "e4b", "26b_a4b", "31b")


def mesh_of(axes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(axes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def bytes_per_device(mesh: AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> int:
    cut = [axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))]
    return 4 * int(np.prod(shape)) // int(np.prod([mesh.shape[axis] for axis in cut]))


def default_meshes(cfg: ModelConfig):
    for devices in (4, 8, 16, 64, 256):
        yield training_axes(cfg, MeshConfig(), devices, devices, 8192)
        yield training_axes(cfg, MeshConfig(), devices, 1, 131072)
        yield decoding_axes(cfg, MeshConfig(), devices)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_large_parameter_is_replicated_on_a_default_mesh(variant):
    cfg = ModelConfig.variant(variant)
    parameters = variables(abstract(cfg))
    for axes in default_meshes(cfg):
        mesh = mesh_of(axes)
        total = rest = 0
        for name, parameter in parameters.items():
            size = 4 * int(np.prod(parameter.shape))
            per_device = bytes_per_device(mesh, stored_spec(mesh, parameter.dims, parameter.shape), parameter.shape)
            holders = mesh.size // mesh.shape["data"]
            assert per_device == size // holders or size <= 2**20, (axes, name)
            total, rest = total + size, rest + per_device
        assert rest < 1.001 * total / holders, axes


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_meshes_use_every_device_and_the_whole_batch(variant):
    cfg = ModelConfig.variant(variant)
    for devices in (1, 4, 8, 16, 64, 256):
        for rows, length in ((devices, 8192), (4 * devices, 4096), (1, 131072), (2, 8192)):
            axes = training_axes(cfg, MeshConfig(), devices, rows, length)
            assert np.prod(list(axes.values())) == devices
            assert rows % (axes["data"] * axes["fsdp"] * axes["expert"]) == 0
            assert (axes["expert"] == 1) or cfg.num_experts
        assert np.prod(list(decoding_axes(cfg, MeshConfig(), devices).values())) == devices


def test_the_experts_of_26b_travel_where_batches_are_large_and_tokens_where_small():
    cfg = ModelConfig.variant("26b_a4b")
    assert training_axes(cfg, MeshConfig(), 64, 64, 4096)["expert"] > 1
    assert training_axes(cfg, MeshConfig(), 64, 2048, 4096)["expert"] == 1


def test_what_the_config_fixes_stays_and_the_rest_is_filled_in():
    cfg = ModelConfig.variant("26b_a4b")
    assert training_axes(cfg, MeshConfig(fsdp=16), 16, 16, 4096)["fsdp"] == 16
    assert training_axes(cfg, MeshConfig(fsdp=4), 16, 16, 4096)["expert"] == 4
    assert training_axes(ModelConfig.variant("31b"), MeshConfig(context=2), 16, 16, 4096)["fsdp"] == 8


def test_a_vocabulary_is_cut_by_rows_and_no_table_is_cut_otherwise():
    mesh = mesh_of({"fsdp": 4, "context": 2, "tensor": 2})
    for table in ("embed.w", "per_layer.table.w"):
        parameter = variables(abstract(ModelConfig.variant("e2b")))[table]
        assert stored_spec(mesh, parameter.dims, parameter.shape) == PartitionSpec(("fsdp", "context", "tensor"), None)


def test_rest_is_cut_where_tpu_tiles_are_not_padded():
    """5,376 columns over 64 devices are 84, which a TPU pads to 128: the rows are cut instead."""
    mesh = mesh_of({"fsdp": 64})
    assert stored_spec(mesh, ("ffw", "embed"), (21504, 5376)) == PartitionSpec("fsdp", None)
    assert stored_spec(mesh, ("embed", "ffw"), (5376, 21504)) == PartitionSpec("fsdp", None)
    assert stored_spec(mesh, ("ffw", "embed"), (21504, 5376), keep_whole=("ffw",)) == PartitionSpec(None, "fsdp")


def test_few_kv_heads_are_whole_in_use_and_cut_at_rest():
    mesh = mesh_of({"tensor": 4})
    assert use_spec(mesh, ("embed", "kv_heads", "head_dim"), (2560, 2, 512)) == PartitionSpec(None, None, None)
    assert stored_spec(mesh, ("embed", "kv_heads", "head_dim"), (2560, 2, 512)) == PartitionSpec("tensor", None, None)
    assert use_spec(mesh, ("embed", "kv_heads", "head_dim"), (5376, 16, 256)) == PartitionSpec(None, "tensor", None)


@pytest.mark.parametrize(
    ("mesh", "rows", "length", "sentence"),
    [
        ({"fsdp": 3}, 8, 128, "config.mesh fixes fsdp 3 = 3, which does not divide the 8 devices"),
        ({"fsdp": 2, "tensor": 2, "context": 1, "data": 1, "expert": 1}, 8, 128, "4 places for 8 devices"),
        ({"tensor": 8}, 8, 128, r"mesh.tensor=8 cannot share out 4 query heads .* wanted one of \[1, 2, 4\]"),
        ({"expert": 2}, 8, 128, "mesh.expert=2 does not divide a model without experts"),
        (
            {"fsdp": 8},
            4,
            128,
            r"4 sequences at a time .* mesh.data=1 x mesh.fsdp=8 x mesh.expert=1; wanted a multiple of 8",
        ),
        ({"context": 8}, 8, 100, "100 tokens in a sequence cannot be shared out"),
        ({}, 3, 129, "3 sequences of 129 tokens cannot be shared out evenly over 8 devices"),
        ({"data": 4, "slices": 8}, 8, 128, "mesh.data=4 must be a multiple of mesh.slices=8"),
    ],
)
def test_impossible_meshes_are_one_sentence(mesh, rows, length, sentence):
    with pytest.raises(UserError, match=sentence):
        training_mesh(ModelConfig.variant("tiny_e2b"), MeshConfig(**mesh), jax.devices(), rows, length)
    with pytest.raises(UserError, match=r"mesh\.fsdp is at least 1, got 0"):
        MeshConfig(fsdp=0)


def test_a_vocabulary_that_cannot_be_shared_out_is_one_sentence():
    cfg = ModelConfig.variant("tiny_31b", vocab_size=900)
    with pytest.raises(
        UserError, match=r"900 rows cannot be shared out over .* = 8 devices; move a factor of it to mesh.data"
    ):
        training_mesh(cfg, MeshConfig(), jax.devices(), 8, 128)


def test_random_weights_do_not_depend_on_the_mesh():
    cfg = ModelConfig.variant("tiny_31b", num_hidden_layers=6)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    alone, shared = init(cfg), init(cfg, mesh=mesh)
    for name, variable in variables(shared).items():
        assert len(variable.get_value().sharding.device_set) == 8
        np.testing.assert_array_equal(variable.get_value(), variables(alone)[name].get_value(), err_msg=name)


def test_long_caches_are_cut_where_heads_are_few():
    """31B has 4 key/value heads on full layers: on 8 devices a long cache is cut over its slots too, a short one is not."""
    cfg = ModelConfig.variant("31b")
    long, short = (decoding_axes(cfg, MeshConfig(), 8, tokens) for tokens in (262_144, 8_192))
    assert (long["tensor"], long["context"]) == (4, 2)
    assert (short["tensor"], short["context"]) == (8, 1)

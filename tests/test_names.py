"""The table of names against transformers' own names and shapes, and as a bijection."""

import json

import numpy as np
import pytest
from conftest import PROJECT

from gemma4_jax.checkpoint import names
from gemma4_jax.config import VARIANTS, ModelConfig
from gemma4_jax.model.linear import Buffer
from gemma4_jax.model.parameters import variables
from gemma4_jax.model.transformer import abstract

TINY = [name for name in VARIANTS if name.startswith("tiny_")]
FULL = [name for name in VARIANTS if not name.startswith("tiny_")]
BILLIONS = {"e2b": 4.63, "e4b": 7.46, "26b_a4b": 25.23, "31b": 30.70}


@pytest.mark.parametrize("variant", FULL)
def test_full_size_models_have_the_names_and_shapes_of_transformers(variant):
    golden = json.loads((PROJECT / "tests/golden/full_size_shapes.json").read_text())[variant]
    wanted, buffers = {}, set()
    for tensor in golden["tensors"]:
        for layer in tensor.get("layers", [None]):
            name = tensor["name"].replace("*", str(layer)).removeprefix(names.MULTIMODAL_PREFIX)
            wanted[name] = tuple(tensor["shape"])
            if tensor["buffer"]:
                buffers.add(name)
    cfg = ModelConfig.variant(variant)
    table = names.table(cfg)
    assert {name: entry.shape for name, entry in table.items()} == wanted
    ours = variables(abstract(cfg))
    assert {name for name, entry in table.items() if isinstance(ours[entry.parameter], Buffer)} == buffers
    shapes = {name: variable.get_value().shape for name, variable in ours.items() if not isinstance(variable, Buffer)}
    count = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    assert count == golden["text_parameters"]
    assert round(count / 1e9, 2) == BILLIONS[variant]


@pytest.mark.parametrize("variant", TINY)
def test_every_element_belongs_to_exactly_one_tensor(variant):
    """Adding one through every view reaches each element of each parameter once; a copy instead of a view adds none."""
    cfg = ModelConfig.variant(variant)
    counts = {name: np.zeros(v.get_value().shape, np.int8) for name, v in variables(abstract(cfg)).items()}
    for entry in names.table(cfg).values():
        view = entry.view(counts[entry.parameter][(*entry.index, ...)])
        assert view.shape == entry.shape
        view += 1
    for name, count in counts.items():
        assert (count == 1).all(), name


def test_matrices_map_as_their_products_do():
    """y = W x of transformers is our contraction, for a plain, a headed, an expert and a per-layer projection."""
    rng = np.random.default_rng(0)

    def of(variant, name):
        cfg = ModelConfig.variant(variant)
        entry = names.table(cfg)[name]
        shape = variables(abstract(cfg))[entry.parameter].get_value().shape[len(entry.index) :]
        own = rng.standard_normal(shape)
        return cfg, own, entry.view(own)

    cfg, own, theirs = of("tiny_31b", "layers.5.self_attn.q_proj.weight")
    x = rng.standard_normal(cfg.hidden_size)
    want = (theirs @ x).reshape(cfg.num_attention_heads, cfg.global_head_dim)
    np.testing.assert_allclose(np.einsum("D,DNH->NH", x, own), want, rtol=1e-12)

    cfg, own, theirs = of("tiny_31b", "layers.4.self_attn.o_proj.weight")
    heads = rng.standard_normal((cfg.num_attention_heads, cfg.head_dim))
    np.testing.assert_allclose(np.einsum("NH,NHD->D", heads, own), theirs @ heads.reshape(-1), rtol=1e-12)

    cfg, own, theirs = of("tiny_26b_a4b", "layers.0.experts.gate_up_proj")
    gate, up = np.split(np.einsum("EJD,D->EJ", theirs, x), 2, axis=-1)
    np.testing.assert_allclose(np.einsum("D,EDCF->ECF", x, own), np.stack([gate, up], 1), rtol=1e-11)

    cfg, own, theirs = of("tiny_e2b", "per_layer_model_projection.weight")
    want = (theirs @ x).reshape(cfg.num_hidden_layers, cfg.hidden_size_per_layer_input)
    np.testing.assert_allclose(np.einsum("D,DLP->LP", x, own), want, rtol=1e-12)


def test_names_are_in_file_order_and_layers_in_their_stacks():
    cfg = ModelConfig.variant("tiny_e2b")
    table = names.table(cfg)
    order = list(table)
    assert order[0] == "embed_tokens.weight"
    assert order[-1] == "norm.weight"
    layers = [int(name.split(".")[1]) for name in order if name.startswith("layers.")]
    assert layers == sorted(layers)
    # 15 layers in blocks of 4 + 1: layer 9 is the second block's full layer, layer 13 the shared block's last sliding.
    assert table["layers.9.layer_scalar"] == names.Entry("own.full.layer_scalar", (1,), (1,))
    assert table["layers.13.layer_scalar"] == names.Entry("shared.sliding.layer_scalar", (0, 3), (1,))


def test_dead_tensors_are_those_of_the_shared_layers():
    dead = names.dead(ModelConfig.variant("tiny_e2b"))
    assert len(dead) == 5 * 3
    assert "layers.10.self_attn.k_proj.weight" in dead
    assert "layers.9.self_attn.k_proj.weight" not in dead
    assert not dead & names.table(ModelConfig.variant("tiny_e2b")).keys()
    assert not names.dead(ModelConfig.variant("tiny_31b"))

"""Sampling from codes: the tokens of the rounded weights, a seventh of their bytes, and a word where there are no codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.infer.weights import decoder_of, parts_of
from gemma4_jax.model import embed, packing
from gemma4_jax.model.decode import Decoder
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.kv import empty_cache
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.parameters import arrays, map_arrays, modules
from gemma4_jax.model.transformer import init
from gemma4_jax.quant.policy import QuantConfig, apply
from gemma4_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    """A mixture on the grids of q4_0, with random norms."""
    sizes = dict(layer_period=2, num_hidden_layers=2, vocab_size=128, hidden_size=64, num_experts=16, top_k_experts=2)
    rng = np.random.default_rng(0)
    plain = init(ModelConfig.variant("tiny_26b_a4b", **sizes), 1)

    def draw(path, variable):
        value = variable.get_value()
        return value if path.endswith(".w") else value * rng.uniform(0.5, 1.5, value.shape).astype(np.float32)

    return apply(map_arrays(draw, plain), QuantConfig())


def answers(model, packed: bool):
    """Tokens and their log-probabilities, of prompts of a chunk, which decode all experts, and steps, which decode the chosen."""
    prompts = [np.random.default_rng(n).integers(3, 128, n).tolist() for n in (3, 20)]
    sampler = Sampler(model, max_length=64, batch_size=2, packed=packed)
    found = sampler.generate(prompts, max_new_tokens=16, temperature=0.0, stop=[])
    return [one.tokens for one in found], np.concatenate([one.logprobs for one in found])


@pytest.fixture(scope="module")
def of_codes(model):
    """On one device."""
    return answers(model, True)


def test_tokens_are_those_of_the_rounded_weights(model, of_codes):
    (tokens, logprobs), (expected, exact) = of_codes, answers(model, False)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, exact, atol=1e-4)


def test_tokens_on_a_mesh_are_those_of_one_device(model, of_codes):
    """Codes lie cut as the weights they stand for: half of a byte's row, a share of the experts."""
    with jax.set_mesh(make_mesh({"expert": 4, "tensor": 2})):
        tokens, logprobs = answers(model, True)
        codes = {name: x for name, x in arrays(parts_of(model, packed=True)[0]).items() if x.dtype == np.uint8}
    assert tokens == of_codes[0]
    np.testing.assert_allclose(logprobs, of_codes[1], atol=1e-4)
    for part, devices in ((".experts.", 8), (".mlp.", 2), ("attention.q", 2)):
        sizes = {x.size // x.addressable_shards[0].data.size for name, x in codes.items() if part in name}
        assert sizes == {devices}, part


def test_bytes_fall(model):
    def size(decoder) -> dict[bool, int]:
        coded = {
            f"{path}."
            for path, module in modules(decoder)
            if isinstance(module, Weight | Embedding) and module.role != "router"
        }
        found = {True: 0, False: 0}
        for name, x in arrays(decoder).items():
            found[any(name.startswith(path) for path in coded)] += x.nbytes
        return found

    codes, floats = size(parts_of(model, packed=True)[0]), size(decoder_of(model))
    assert codes[False] == floats[False]
    # 4 bits and a scale of 16 bits for 32 weights, against 32 bits.
    assert codes[True] == floats[True] * (4 + 16 / 32) / 32


@pytest.mark.parametrize(("policy", "rows"), [("q4_0", 128), ("mobile", 128), ("q4_0", 48), ("q4_0", 1000)])
def test_tables_are_read_among_codes(policy, rows, monkeypatch):
    """Rows of codes are decoded where they are read, some at a time for the head; not on a mesh, where rows travel as numbers."""
    monkeypatch.setattr(embed, "PART", rows)
    monkeypatch.setattr(packing, "PART", rows * 64)
    sizes = dict(layer_period=2, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size=64, intermediate_size=64)
    cfg = ModelConfig.variant("tiny_e2b", vocab_size=128, **sizes)
    plain = init(cfg, 1)
    model = apply(plain, QuantConfig(policy=policy, activations="none", kv_cache="none"))
    codes, rounded = parts_of(model, packed=True)[0], decoder_of(model)
    tokens = jnp.arange(128).reshape(8, 16)
    for table_of in (lambda of: of.embed, lambda of: of.per_layer.table):
        table = table_of(codes)
        assert table.w[...].dtype == np.uint8
        wanted = table_of(model).lookup(tokens, "float32")
        np.testing.assert_array_equal(table.lookup(tokens, "float32"), wanted)
        assert np.abs(wanted - table_of(plain).lookup(tokens, "float32")).max() > 0
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), "float32")
    np.testing.assert_allclose(codes.logits(hidden), rounded.logits(hidden), rtol=0, atol=1e-5)
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        whole = parts_of(model, packed=True)[0]
        assert whole.per_layer is not None
        assert {table.w[...].dtype for table in (whole.embed, whole.per_layer.table)} == {np.dtype("float32")}


def test_weights_are_decoded_one_after_the_other():
    """A step's temporaries: XLA for CPUs decoded all layers first, which took more memory than weights that are no codes."""
    cfg = ModelConfig.variant("tiny_31b", num_hidden_layers=6, vocab_size=128, hidden_size=256, intermediate_size=2048)
    decoder = parts_of(apply(init(cfg, 1), QuantConfig()), packed=True)[0]
    weights = [module.w[...].size * 2 for _, module in modules(decoder) if isinstance(module, Weight)]
    tokens = jnp.zeros((1, 1), "int32")
    cache = empty_cache(cfg, 1, 64, dtype="float32")
    memory = jax.jit(Decoder.step).lower(decoder, tokens, tokens, cache).compile().memory_analysis()
    assert memory is not None
    assert max(weights) * 4 <= memory.temp_size_in_bytes < 4 * max(weights) * 4 < sum(weights) * 4 / 4


def test_there_must_be_codes():
    with pytest.raises(UserError, match=r"sample\.packed .* not trained on a grid"):
        Sampler(init(ModelConfig.variant("tiny_31b", num_hidden_layers=6)), max_length=64, packed=True, consume=True)

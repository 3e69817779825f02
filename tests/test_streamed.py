"""Conversions that never hold the model: what they write is what the ones in memory write."""

import jax
import numpy as np
import pytest

from gemma4_jax.checkpoint import store, streamed
from gemma4_jax.checkpoint.digest import digests, run_digest
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.checkpoint.hf_export import write_hf
from gemma4_jax.checkpoint.load import load, source
from gemma4_jax.checkpoint.steps import read_record, step_directory
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.checkpoint.stored import open_stored
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant import policy

SMALL = dict(vocab_size=300, hidden_size=32, head_dim=16, global_head_dim=32)
PER_LAYER = {"tiny_e2b": {"vocab_size_per_layer_input": 300}}


def random_model(variant: str, **changes) -> Transformer:
    rng = np.random.default_rng(0)

    def value(name, variable):
        shape = variable.get_value().shape
        return jax.numpy.asarray(rng.normal(0, 1, shape), variable.get_value().dtype)

    return map_arrays(value, abstract(ModelConfig.variant(variant, **SMALL, **changes)))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("variant", "changes"),
    [("tiny_e2b", PER_LAYER["tiny_e2b"]), ("tiny_26b_a4b", {"multimodal": True})],
)
def test_a_streamed_directory_is_that_of_the_loaded_model(variant, changes, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 5000)  # tables of many chunks, the last of them smaller
    save_hf(random_model(variant, **changes), tmp_path / "hf", dtype="bfloat16")
    streamed.save_source(source(tmp_path / "hf"), tmp_path / "streamed", dtype=dtype)
    save_model(load(tmp_path / "hf", dtype=dtype), tmp_path / "held")
    ours, theirs = (read_record(step_directory(tmp_path / name)) for name in ("streamed", "held"))
    assert ours == theirs
    found, wanted = (load(tmp_path / name) for name in ("streamed", "held"))
    assert found.compute_dtype == wanted.compute_dtype
    held = arrays(wanted)
    assert arrays(found).keys() == held.keys()
    for name, value in arrays(found).items():
        assert value.dtype == held[name].dtype
        np.testing.assert_array_equal(np.asarray(value), np.asarray(held[name]), err_msg=name)


def test_a_table_is_several_chunks_and_a_stack_one_for_each_layer(tmp_path):
    save_hf(random_model("tiny_e2b"), tmp_path, dtype="bfloat16")
    found = source(tmp_path)
    pieces = streamed.pieces_of(found.cfg, found.tensors)
    table = streamed.Streamed((300, 32), np.dtype("float32"), tuple(pieces["embed.w"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "CHUNK", 7 * 32 * 4)
        assert table.chunk == (7, 32)
        places = [where[0] for where, _ in table.blocks()]
    assert places == [slice(start, min(start + 7, 300)) for start in range(0, 300, 7)]


def test_a_digest_run_by_run():
    x = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    flat = x.reshape(-1)
    whole = digests({"x": jax.numpy.asarray(x)})["x"]
    assert run_digest((start, flat[start : start + 20]) for start in range(0, 77, 20)) == whole
    assert run_digest((start, flat[start : start + 20][::-1]) for start in range(0, 77, 20)) != whole


def test_a_full_directory_is_refused_before_a_weight_is_read(tmp_path):
    save_hf(random_model("tiny_e2b"), tmp_path / "hf", dtype="bfloat16")
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        streamed.save_source(source(tmp_path / "hf"), tmp_path / "hf")


@pytest.mark.parametrize(
    ("variant", "grids"),
    [
        ("tiny_e2b", None),
        ("tiny_26b_a4b", None),
        ("tiny_e2b", {"policy": "q4_0", "learn_scales": True}),
        ("tiny_26b_a4b", {"policy": "w4a16"}),
        ("tiny_e2b", {"policy": "mobile"}),
    ],
    ids=lambda value: value["policy"] if isinstance(value, dict) else value,
)
def test_a_streamed_export_is_that_of_the_loaded_model(variant, grids, tmp_path):
    """From our directory to Hugging Face's: the same bytes, in as many files, on a grid as the grid rounds them."""
    model = random_model(variant, multimodal=True, **PER_LAYER.get(variant, {}))
    save_model(model if grids is None else policy.apply(model, policy.QuantConfig(**grids)), tmp_path / "ours")
    write_hf(source(tmp_path / "ours"), tmp_path / "streamed", max_shard_size="1MB", requantise=True)
    save_hf(load(tmp_path / "ours"), tmp_path / "held", max_shard_size="1MB")
    names = sorted(file.name for file in (tmp_path / "held").iterdir())
    assert sorted(file.name for file in (tmp_path / "streamed").iterdir()) == names
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "held" / name).read_bytes(), name


def test_an_export_of_a_damaged_step_is_refused(tmp_path):
    """The weights are read as they stand on disk, not through Orbax: a changed bit has to be found here too."""
    save_model(random_model("tiny_e2b"), tmp_path / "ours")
    largest = max((p for p in (tmp_path / "ours" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        source(tmp_path / "ours")


def test_large_arrays_are_stored_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 4000)
    model = random_model("tiny_e2b")
    save_model(model, tmp_path / "ours")
    chunks = {}
    for name in ("params.embed.w", "params.own.sliding.mlp.up.w", "params.final_norm.scale"):
        chunks[name] = open_stored(tmp_path / "ours", name).opened.chunk_layout.read_chunk.shape
    assert chunks["params.embed.w"] == (30, 32)  # the largest divisor of 300 rows within 4,000 bytes
    assert chunks["params.own.sliding.mlp.up.w"][0] == 1
    assert chunks["params.final_norm.scale"] == (32,)
    for name, value in arrays(load(tmp_path / "ours")).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(arrays(model)[name]), err_msg=name)

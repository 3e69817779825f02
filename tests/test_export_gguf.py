"""GGUF against the `gguf` package, an independent reader: every weight bit for bit, every key, and what comes back."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from exporting import forward_weights, on_policy, random_model

from gemma4_jax import assets
from gemma4_jax.checkpoint import gguf_names, names
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.checkpoint.gguf import read_gguf
from gemma4_jax.checkpoint.gguf_file import read_header
from gemma4_jax.checkpoint.load import load, load_config
from gemma4_jax.checkpoint.source import grids_of, of_path
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays
from gemma4_jax.quant import policy
from gemma4_jax.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the twin reader, `gguf`, is in the dev extra")
VARIANTS = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")


def write(model, path, **options):
    return export(model, path, format="gguf", tokenizer=assets.TOKENIZER, **options)


def twin(path):
    """Metadata and float32 tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = (values.reshape(tuple(reversed(tensor.shape.tolist()))), tensor.tensor_type.name)
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", ["q4_0", "q4_0_bf16", "int4_sym7_g32", "q8_0"])
def test_the_file_holds_what_the_forward_pass_computes_with(variant, grid, tmp_path):
    if grid != "q4_0" and variant not in ("tiny_e2b", "tiny_26b_a4b"):
        pytest.skip("one dense and one sparse model are enough for the other grids")
    model = on_policy(random_model(variant), "q4_0", grid=grid)
    report = write(model, tmp_path / "m.gguf", dtype="float32")
    _, tensors = twin(tmp_path / "m.gguf")
    wanted = {gguf_names.gguf_name(name): value for name, value in forward_weights(model).items()}
    assert tensors.keys() == wanted.keys() | {"rope_freqs.weight"}
    for name, value in wanted.items():
        np.testing.assert_array_equal(tensors[name][0], value, err_msg=name)
    kinds = {kind for _, kind in tensors.values()}
    assert kinds == {"F32", "Q8_0" if grid == "q8_0" else "Q4_0"}
    # Experts, embeddings and per-layer tables among them.
    coded = {name for name, (_, kind) in tensors.items() if kind != "F32"}
    assert "token_embd.weight" in coded
    assert ("per_layer_token_embd.weight" in coded) == ("e2b" in variant or "e4b" in variant)
    assert ("blk.0.ffn_gate_up_exps.weight" in coded) == ("26b" in variant)
    assert not [fate for fate in report.outcome.fates if fate.off]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_back_is_the_model_with_its_grids(variant, tmp_path):
    model = on_policy(random_model(variant), "q4_0")
    write(model, tmp_path / "m.gguf", dtype="float32")
    again = load(tmp_path / "m.gguf")
    assert again.cfg == model.cfg == load_config(tmp_path / "m.gguf")
    assert grids_of(again) == grids_of(model)
    snapped, got = arrays(policy.snap(model)), arrays(again)
    for name, value in snapped.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    # A second export, from the loaded model or straight from the file, is the same file.
    write(again, tmp_path / "loaded.gguf", dtype="float32", name="m")
    write(tmp_path / "m.gguf", tmp_path / "file.gguf", dtype="float32", name="m")
    first = (tmp_path / "m.gguf").read_bytes()
    assert (tmp_path / "loaded.gguf").read_bytes() == first
    assert (tmp_path / "file.gguf").read_bytes() == first


def test_grids_are_found_in_a_file_that_does_not_name_them(tmp_path):
    """As a file of other programs: Q4_0 by ggml's own quantiser, on weights it likes."""
    model = on_policy(random_model("tiny_31b"), "q4_0", grid="int4_sym7_g32")
    write(model, tmp_path / "m.gguf", dtype="float32")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "anonymous.gguf").write_bytes(raw.replace(b"gemma4_jax.grids", b"somebody_s.notes"))
    again = load(tmp_path / "anonymous.gguf")
    assert grids_of(again) == grids_of(model)
    assert of_path(tmp_path / "anonymous.gguf").grids == grids_of(model)


def test_scales_that_no_rule_finds_come_back_as_parameters(tmp_path):
    """Learned scales: the file's lattice is neither q4_0's nor the portable one, and must survive loading."""
    model = policy.learning(on_policy(random_model("tiny_31b"), "q4_0", grid="q4_0", cover=("attention", "ffw")))
    rng = np.random.default_rng(1)
    for _, module in policy.quantisable(model):
        if module.grid_scale is not None:
            scale = module.grid_scale.get_value()
            factor = jnp.asarray(rng.uniform(0.7, 1.0, scale.shape), scale.dtype)
            module.grid_scale = module.grid_scale.replace(scale * factor)
    write(model, tmp_path / "m.gguf", dtype="float32")
    _, tensors = twin(tmp_path / "m.gguf")
    for name, value in forward_weights(model).items():
        np.testing.assert_array_equal(tensors[gguf_names.gguf_name(name)][0], value, err_msg=name)
    again = load(tmp_path / "m.gguf")
    assert grids_of(again) == grids_of(model)
    for name, value in forward_weights(again).items():
        np.testing.assert_array_equal(value, tensors[gguf_names.gguf_name(name)][0], err_msg=name)


@pytest.mark.parametrize(("variant", "double_wide"), [("tiny_e2b", True), ("tiny_26b_a4b", False)])
def test_metadata_as_the_twin_reads_it(variant, double_wide, tmp_path):
    cfg = ModelConfig.variant(variant)
    write(random_model(variant), tmp_path / "m.gguf")
    keys, tensors = twin(tmp_path / "m.gguf")
    assert keys["general.architecture"] == "gemma4"
    assert keys["general.file_type"] == 32
    assert keys["gemma4.block_count"] == cfg.num_hidden_layers
    assert keys["gemma4.attention.sliding_window_pattern"] == [kind == "sliding" for kind in cfg.layer_kinds]
    if double_wide:
        assert keys["gemma4.feed_forward_length"] == [256] * 10 + [512] * 5
        assert keys["gemma4.attention.head_count_kv"] == 1
    else:
        assert keys["gemma4.attention.head_count_kv"] == [2, 2, 2, 2, 2, 1] * 2
        assert keys["gemma4.expert_count"] == 8
    tokenizer = Tokenizer.load(assets.TOKENIZER)
    assert keys["tokenizer.ggml.tokens"] == [tokenizer.piece_of(i) for i in range(tokenizer.vocab_size)]
    frequencies, kind = tensors["rope_freqs.weight"]
    assert kind == "F32"
    # 64 dims, a quarter of the 32 pairs rotates.
    np.testing.assert_array_equal(frequencies, [1.0] * 8 + [np.float32(1e30)] * 24)
    assert all(kind == "F32" for name, (_, kind) in tensors.items() if "norm" in name or "ffn_gate_inp" in name)


def test_full_size_names_and_counts_are_those_of_published_files():
    """541, 666, 658 and 833 tensors: what the loaders of published files report."""
    for variant, count in (("e2b", 541), ("e4b", 666), ("26b_a4b", 658), ("31b", 833)):
        cfg = ModelConfig.variant(variant)
        assert 1 + len(gguf_names.expected(cfg)) == count, variant
        assert len(set(map(gguf_names.gguf_name, names.table(cfg)))) == len(names.table(cfg))


def test_float_types(tmp_path):
    model = random_model("tiny_e2b")
    for dtype, kind in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")):
        write(model, tmp_path / f"{dtype}.gguf", dtype=dtype)
        _, tensors = twin(tmp_path / f"{dtype}.gguf")
        for name, value in forward_weights(model).items():
            got, stored = tensors[gguf_names.gguf_name(name)]
            cast = np.asarray(value).astype(jnp.dtype(dtype) if stored == kind else np.float32)
            np.testing.assert_array_equal(got, cast.astype(np.float32), err_msg=name)
        assert load(tmp_path / f"{dtype}.gguf").cfg == model.cfg


def test_q6_k_decodes_as_the_twin_does(tmp_path):
    """Google's files have Q6_K embeddings; random bytes are valid blocks but for their float16 scale."""
    from gemma4_jax.checkpoint.ggml_types import TYPE_Q6_K

    raw = np.random.default_rng(0).integers(0, 256, (64, 210)).astype(np.uint8)
    raw[:, 208:] = np.linspace(-2, 2, 64).astype(np.float16)[:, None].view(np.uint8)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(TYPE_Q6_K.decode(raw), wanted.reshape(64, 256))


def test_the_tokenizer_of_a_file_is_the_one_that_was_written(tmp_path):
    write(random_model("tiny_e2b"), tmp_path / "m.gguf")
    ours, theirs = Tokenizer.load(tmp_path / "m.gguf"), Tokenizer.load(assets.TOKENIZER)
    assert ours.special == theirs.special
    for line in assets.HELDOUT.read_text().splitlines()[:50]:
        text = json.dumps(json.loads(line), ensure_ascii=False)
        assert ours.encode(text) == theirs.encode(text)


def test_the_published_tokenizer(shared_data, tmp_path):
    """514,906 merges and 262,144 pieces, as in published files; and text becomes the same ids."""
    from gemma4_jax.checkpoint import gguf_tokenizer

    found = gguf_tokenizer.metadata_of(shared_data / "tokenizer_gemma4.model", 262144)
    assert len(found["tokenizer.ggml.merges"].value) == 514906
    ours = Tokenizer(json.dumps(gguf_tokenizer.to_json(found, "")).encode(), "tokenizer.json")
    for line in (shared_data / "tokenizer_golden.jsonl").read_text().splitlines():
        golden = json.loads(line)
        assert ours.encode(golden["text"]) == golden["ids"]


def damaged(tmp_path, change):
    """A file with one change, and what loading it says."""
    path = tmp_path / "m.gguf"
    write(random_model("tiny_31b"), path)
    raw = change(path.read_bytes())
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "bad.gguf")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.replace(b"gemma4", b"llama4", 1), "'llama4' model"),
        (lambda raw: raw[:-1000], "truncated"),
        (lambda raw: raw[:500], "truncated"),
        (lambda raw: b"nope" + raw[4:], "not a GGUF file"),
        (lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:], "version 9"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
        (lambda raw: raw.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", 1), "1 missing"),
        (lambda raw: raw.replace(b"gemma4.block_count", b"gemma4.block_wrong", 1), "gemma4.block_count"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, change, said):
    assert said in damaged(tmp_path, change)


def test_unknown_types_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    write(random_model("tiny_31b"), path)
    raw = path.read_bytes()
    _, placed = read_header(path)
    name = b"blk.0.attn_q.weight"
    at = raw.index(name) + len(name) + 4 + 16
    assert raw[at : at + 4] == struct.pack("<I", placed[name.decode()].type.number)
    path.write_bytes(raw[:at] + struct.pack("<I", 12) + raw[at + 4 :])
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight as ggml type Q4_K; this version reads"):
        read_gguf(path)

"""Hugging Face directories: bits survive the way there and back, and everything wrong is refused in one sentence."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import PROJECT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma4_jax.checkpoint import names, safetensors_io
from gemma4_jax.checkpoint.hf import load_hf, parse_size, read_config, save_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.safetensors_io import read_header
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract

TINY = ["tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b"]
GOLDEN = PROJECT / "tests" / "golden"
SMALL = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64, head_dim=8
)


def random_model(cfg: ModelConfig, dtype: str = "bfloat16", seed: int = 0) -> Transformer:
    """Every array random, buffers and norms included: nothing can hide behind a default of 1."""
    rng = np.random.default_rng(seed)

    def fill(_name, variable):
        values = rng.standard_normal(variable.get_value().shape).astype(jnp.dtype(dtype))
        return jax.device_put(values)

    return map_arrays(fill, abstract(cfg, dtype))


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory as the `safetensors` package reads it: dtype, shape, bytes."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in load_file(file).items()}
    return found


def same_arrays(a: Transformer, b: Transformer) -> bool:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    return all(
        left[n].dtype == right[n].dtype and np.asarray(left[n]).tobytes() == np.asarray(right[n]).tobytes()
        for n in left
    )


@pytest.fixture
def small() -> Transformer:
    return random_model(ModelConfig.variant("tiny_31b", **SMALL))


@pytest.fixture
def directory(small, tmp_path) -> Path:
    """A small valid checkpoint, for tests to damage."""
    return save_hf(small, tmp_path / "hf")


def rewrite(file: Path, change) -> None:
    """Rewrites a safetensors file with `change(tensors)` applied to its dict of arrays."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", TINY)
def test_hf_to_orbax_to_hf_is_bit_identical(variant, tmp_path):
    model = random_model(ModelConfig.variant(variant))
    first = save_hf(model, tmp_path / "first")
    save_model(load(first), tmp_path / "orbax")
    again = load(tmp_path / "orbax")
    second = save_hf(again, tmp_path / "second", max_shard_size="200KB")
    assert same_arrays(model, again)
    assert again.cfg == model.cfg
    assert again.compute_dtype == "bfloat16"
    assert raw(first) == raw(second)
    assert {name for name, _, _ in raw(first).values()} == {"bfloat16"}
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    assert read_config(second) == model.cfg


@pytest.mark.parametrize("variant", TINY)
def test_golden_checkpoints_survive_load_and_save(variant, tmp_path):
    """transformers' own files, both prefixes, sharded, with towers and dead tensors: the text tensors keep their bits."""
    model = load(GOLDEN / variant, text_only=True)
    written = raw(save_hf(model, tmp_path / "hf", spelling="old"))
    dead = names.dead(model.cfg)
    wanted = {}
    for name, value in raw(GOLDEN / variant).items():
        short = name.removeprefix(names.MULTIMODAL_PREFIX).removeprefix("model.")
        if short not in dead and not name.startswith(names.TOWERS) and name != names.HEAD:
            wanted[f"model.{short}"] = value
    assert written == wanted
    assert read_config(tmp_path / "hf") == model.cfg


def test_shards_keep_to_the_limit_and_the_index_names_all(small, tmp_path):
    path = save_hf(small, tmp_path / "hf", max_shard_size="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(opened.keys())
        sizes = [array.nbytes for array in load_file(file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw(path).values())
    assert same_arrays(load(path), small)


def test_row_blocks_change_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", 100)
    path = save_hf(small, tmp_path / "hf", dtype="float32")
    assert same_arrays(load(path, dtype="bfloat16"), small)


def test_dtypes_are_kept_or_cast(small, directory):
    wide = load(directory, dtype="float32", compute_dtype="bfloat16")
    assert {a.dtype.name for a in arrays(wide).values()} == {"float32"}
    assert wide.compute_dtype == "bfloat16"
    for name, value in arrays(small).items():
        np.testing.assert_array_equal(np.asarray(arrays(wide)[name]), np.asarray(value).astype(np.float32))
    rewrite(
        directory / "model.safetensors",
        lambda t: t.update({"model.layers.2.layer_scalar": t["model.layers.2.layer_scalar"].astype(np.float32)}),
    )
    mixed = arrays(load(directory))
    assert mixed["own.sliding.layer_scalar"].dtype == jnp.float32
    assert mixed["own.full.layer_scalar"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="cannot be int8; wanted one of float32"):
        load(directory, dtype="int8")


def test_generation_config_and_extra_files(small, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    path = save_hf(small, tmp_path / "hf", extra_files=[tmp_path / "tokenizer.json"])
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 50]  # 106 lies outside this vocabulary of 96
    assert (path / "tokenizer.json").read_text() == "{}"
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Gemma4ForCausalLM"]


def test_parameters_go_where_shardings_say(small, directory):
    mesh = jax.make_mesh((8,), ("x",))

    def over_embed(_name, variable):
        spec = [None if dim != "embed" else "x" for dim in variable.dims]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    sharded = load_hf(directory, shardings=over_embed)
    q = arrays(sharded)["own.sliding.attention.q.w"]
    assert q.addressable_shards[0].data.shape[2] == q.shape[2] // 8
    assert same_arrays(sharded, small)


def test_text_only_leaves_towers_unread(monkeypatch):
    read = set()
    blocks = safetensors_io.Tensor.blocks
    monkeypatch.setattr(safetensors_io.Tensor, "blocks", lambda self: (read.add(self.name), blocks(self))[1])
    load(GOLDEN / "tiny_e2b", text_only=True)
    assert read
    assert not [name for name in read if name.startswith(names.TOWERS)]
    assert "model.language_model.layers.14.self_attn.k_proj.weight" not in read


def test_a_stored_head_must_equal_the_embedding(small, directory):
    file = directory / "model.safetensors"
    rewrite(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert same_arrays(load(directory), small)
    rewrite(file, lambda t: t["lm_head.weight"].__setitem__((95, 31), 9))
    with pytest.raises(UserError, match=r"stores lm_head.weight with other values"):
        load(directory)
    rewrite(file, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][1:].copy()}))
    with pytest.raises(UserError, match=r"stores lm_head.weight with other values"):
        load(directory)


def test_wrong_tensors_are_listed(directory):
    file = directory / "model.safetensors"

    def damage(t):
        del t["model.norm.weight"]
        t["model.surprise"] = np.zeros(1, np.float32)
        t["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)

    rewrite(file, damage)
    with pytest.raises(UserError) as error:
        load(directory)
    assert "1 missing: model.norm.weight; 1 unexpected: model.surprise; 1 misshaped: " in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight (wanted [64, 32], got [3, 4])" in str(error.value)
    assert "another variant?" in str(error.value)


def test_config_of_another_variant_lists_a_few_and_counts_the_rest(directory):
    cfg = ModelConfig.variant("tiny_31b", **{**SMALL, "hidden_size": 64})
    (directory / "config.json").write_text(json.dumps(cfg.to_hf()))
    with pytest.raises(UserError, match=r"misshaped: .* and \d+ more\. Is this config\.json of another variant\?"):
        load(directory)


def _without_config(d):
    (d / "config.json").unlink()


def _cut(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _empty_file(d):
    (d / "model.safetensors").write_bytes(b"")


def _no_weights(d):
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def _stray_shards(d):
    (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors")


def _quantised(d):
    rewrite(d / "model.safetensors", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "must be a JSON object, got list"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "model_type 'llama'"),
        (_cut, "is truncated: its tensors need"),
        (_empty_file, "is truncated: 0 bytes"),
        (_no_weights, "neither model.safetensors nor .*pytorch_model.bin is not read"),
        (_stray_shards, "has model-00001-of-00002.safetensors but no model.safetensors.index.json"),
        (_quantised, "stores model.norm.weight as I8; wanted F32, F16, BF16"),
    ],
)
def test_damaged_directories_are_refused(directory, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message):
        load_hf(directory)


def test_config_numbers_that_no_model_has(directory):
    config = json.loads((directory / "config.json").read_text())
    config["num_key_value_heads"] = 0
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"num_key_value_heads is a whole number from 1"):
        load(directory)


def test_missing_empty_and_foreign_directories(tmp_path):
    with pytest.raises(UserError, match=r"directory '.*nowhere' does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"directory '.*empty' is empty"):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; wanted the checkpoint's directory"):
        load(tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"is no checkpoint: wanted config.json"):
        load(tmp_path / "foreign")


@pytest.fixture
def sharded(small, tmp_path) -> Path:
    return save_hf(small, tmp_path / "sharded", max_shard_size="40KB")


def reindex(path: Path, change) -> None:
    """Rewrites the index with `change(weight_map)` applied."""
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["/etc/passwd", "../hf/model.safetensors", "sub/model.safetensors", "..", "a\\b", ""])
def test_index_paths_stay_inside(sharded, name):
    reindex(sharded, lambda m: m.update({"model.norm.weight": name}))
    with pytest.raises(UserError, match="wanted bare file names inside the directory"):
        load(sharded)


def test_links_out_of_the_directory_are_refused_except_in_a_hub_cache(small, sharded, tmp_path):
    shard = min(sharded.glob("*.safetensors"))
    blob = tmp_path / "cache" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    shard.rename(blob)
    shard.symlink_to(blob)
    with pytest.raises(UserError, match=r"is a link to .* outside the checkpoint"):
        load(sharded)
    snapshot = tmp_path / "cache" / "snapshots" / "revision"
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    assert same_arrays(load(snapshot), small)
    outside = tmp_path / "elsewhere"
    blob.rename(outside)
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere, outside"):
        load(snapshot)


def test_index_and_shards_must_agree(sharded):
    first, second, *_, last = sorted(file.name for file in sharded.glob("*.safetensors"))
    reindex(sharded, lambda m: m.update({"model.ghost": first}))
    with pytest.raises(UserError, match=r"1 tensors are absent \(model.ghost"):
        load(sharded)
    reindex(sharded, lambda m: m.pop("model.ghost"))
    reindex(sharded, lambda m: m.update({"model.norm.weight": first}))
    with pytest.raises(UserError, match=r"1 are elsewhere or not listed \(model.norm.weight"):
        load(sharded)
    reindex(sharded, lambda m: m.update({"model.norm.weight": last}))
    rewrite(sharded / second, lambda t: t.update({"model.embed_tokens.weight": np.zeros(2, np.float32)}))
    with pytest.raises(UserError, match=r"holds 1 tensors twice: model.embed_tokens.weight"):
        load(sharded)
    (sharded / second).unlink()
    with pytest.raises(UserError, match=f"lacks {second}, which"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load(sharded)


def header_file(path: Path, header: str | dict, data: bytes = b"", length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "starts at byte 8 of the data, wanted 4"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, "starts at byte 4 of the data, wanted 8"),
    "trailing": ({"a": entry([1], 0, 4)}, 5, "is damaged: its tensors need 4 bytes, it holds 5"),
    "short": ({"a": entry([2], 0, 8)}, 4, "is truncated: its tensors need 8 bytes, it holds 4"),
    "shape": ({"a": entry([3], 0, 8)}, 8, "cannot fill bytes 0 to 8"),
    "overflow": ({"a": entry([2**32, 2**32], 0, 0)}, 0, "cannot fill bytes"),
    "reversed": ({"a": entry([1], 4, 0)}, 4, "cannot fill bytes 4 to 0"),
    "negative": ({"a": entry([-1, -1], 0, 4)}, 4, "are not whole numbers"),
    "bool": ({"a": entry([True], 0, 4)}, 4, "are not whole numbers"),
    "dtype": ({"a": entry([1], 0, 4, "Q4_0")}, 4, "which the format does not have"),
    "extra key": ({"a": {**entry([1], 0, 4), "x": 1}}, 4, "is not dtype, shape and data_offsets"),
    "array": ("[]", 0, "its header is no JSON object"),
    "no json": ("{", 0, "is not a safetensors file"),
    "no utf-8": ("\udcff", 0, "is not a safetensors file"),
    "deep": ("[" * 100_000, 0, "is not a safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers_are_refused(tmp_path, case):
    header, size, message = HEADERS[case]
    if case == "no utf-8":
        (tmp_path / "f").write_bytes(struct.pack("<Q", 1) + b"\xff")
    else:
        header_file(tmp_path / "f", header, bytes(size))
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "f")


def test_names_given_twice_are_refused_though_the_package_takes_them(tmp_path):
    one = json.dumps(entry([1], 0, 4))
    file = header_file(tmp_path / "f", f'{{"a": {one}, "a": {one}}}', bytes(4))
    assert list(load_file(file)) == ["a"]
    with pytest.raises(UserError, match="has these names twice: a"):
        read_header(file)


def test_header_length_is_checked_before_it_is_believed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is truncated: 10 bytes do not hold its header"):
        read_header(header_file(tmp_path / "f", "{}", length=1 << 62))
    monkeypatch.setattr(safetensors_io, "HEADER_LIMIT", 10)
    with pytest.raises(UserError, match="has a header of 100 bytes; at most 10 are read"):
        read_header(header_file(tmp_path / "f", " " * 100))


def test_reader_agrees_with_the_package_on_every_dtype_we_read(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 7)).astype(np.float32)
    tensors = {d.__name__: values.astype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)}
    save_file({**tensors, "ints": np.arange(3), "empty": np.zeros((0, 4), np.float32)}, tmp_path / "f")
    ours = read_header(tmp_path / "f")
    assert ours.keys() == {*tensors, "ints", "empty"}
    for name, value in tensors.items():
        ((rows, block),) = ours[name].blocks()
        assert rows == slice(0, 5)
        assert block.dtype == value.dtype
        assert block.tobytes() == value.tobytes()


def test_saving_refuses_to_overwrite_and_leaves_nothing_half_done(small, directory, tmp_path):
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        save_hf(small, directory)
    (tmp_path / "empty").mkdir()
    save_hf(small, tmp_path / "empty")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be written"):
        save_hf(small, tmp_path / "new", extra_files=[tmp_path / "absent.json"])
    with pytest.raises(UserError, match="cannot be written"):
        save_hf(small, directory / "config.json" / "below")
    with pytest.raises(UserError, match="cannot be int4; wanted one of"):
        save_hf(small, tmp_path / "new", dtype="int4")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 kb", 1500), (123, 123), ("7", 7), ("0GB", None), ("five", None), ("-1MB", None)],
)
def test_sizes(text, size):
    if size is not None:
        assert parse_size(text) == size
    else:
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)


def test_loading_hf_does_not_import_orbax():
    code = "import sys, gemma4_jax.checkpoint.load; sys.exit('orbax' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0

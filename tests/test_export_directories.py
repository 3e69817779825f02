"""hf, compressed-tensors and mobile directories: what is in them, decoded by other code, and what comes back."""

import json

import ml_dtypes
import numpy as np
import pytest
from conftest import PROJECT
from exporting import forward_weights, on_policy, random_model
from safetensors.numpy import load_file

from gemma4_jax import assets
from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.source import grids_of, of_path
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays
from gemma4_jax.quant import policy


def read(directory):
    """Every tensor of a directory without prefix, as the safetensors package reads it."""
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return {name.removeprefix(names.TEXT_PREFIX): value for name, value in found.items()}


def unpacked(words, bits, width):
    """int32 words to codes, one by one: element i in word i * bits // 32 at bit i * bits % 32."""
    words = words.view(np.uint32).astype(np.uint64)
    at = np.arange(width) * bits
    return ((words[:, at // 32] >> (at % 32).astype(np.uint64)) & ((1 << bits) - 1)).astype(np.int64) - (
        1 << (bits - 1)
    )


@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_26b_a4b"])
@pytest.mark.parametrize("name", ["q4_0", "w4a16"])
def test_bfloat16_weights_are_exactly_on_the_lattice(variant, name, tmp_path):
    model = on_policy(random_model(variant), name)
    export(model, tmp_path / "hf", format="hf")
    stored = read(tmp_path / "hf")
    on_grid = {name for name, entry in names.table(model.cfg).items() if entry.parameter in grids_of(model)}
    for tensor, wanted in forward_weights(model).items():
        got = stored[tensor]
        assert got.dtype == ml_dtypes.bfloat16
        if tensor in on_grid:
            np.testing.assert_array_equal(got.astype(np.float32), wanted, err_msg=tensor)
    again = load(tmp_path / "hf")
    assert grids_of(again) == grids_of(model)
    note = json.loads((tmp_path / "hf" / "quantization_manifest.json").read_text())
    assert note["how"] == "as trained on its grids"
    assert note["tensors"].keys() == names.table(model.cfg).keys()


@pytest.mark.parametrize("experts", ["float", "packed"])
@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_26b_a4b"])
def test_compressed_tensors(variant, experts, tmp_path):
    model = on_policy(random_model(variant), "w4a16")
    export(model, tmp_path / "ct", format="compressed-tensors", dtype="float32", experts=experts)
    stored, wanted = read(tmp_path / "ct"), forward_weights(model)
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    assert packed
    for module in packed:
        shape = stored[f"{module}.weight_shape"].tolist()
        codes, scales = unpacked(stored[f"{module}.weight_packed"], 4, shape[1]), stored[f"{module}.weight_scale"]
        value = codes.astype(np.float32) * np.repeat(scales, 32, axis=1)
        if ".experts." in module:
            home, expert, part = module.rsplit(".", 2)
            fused = wanted[f"{home}.gate_up_proj" if part != "down_proj" else f"{home}.down_proj"][int(expert)]
            half = len(fused) // 2
            want = {"gate_proj": fused[:half], "up_proj": fused[half:], "down_proj": fused}[part]
        else:
            want = wanted[f"{module}.weight"]
        np.testing.assert_array_equal(value, want, err_msg=module)
    assert any(".experts." in module for module in packed) == (experts == "packed" and variant == "tiny_26b_a4b")
    assert not any("router" in module or "embed_tokens" in module for module in packed)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    again = load(tmp_path / "ct")
    for tensor, value in forward_weights(again).items():
        np.testing.assert_array_equal(value, wanted[tensor], err_msg=tensor)
    if experts == "packed" or variant == "tiny_e2b":
        assert grids_of(again) == grids_of(model)


def test_mobile(tmp_path):
    model = on_policy(random_model("tiny_e2b"), "mobile")
    export(model, tmp_path / "m", format="mobile", dtype="float32")
    stored, wanted = read(tmp_path / "m"), forward_weights(model)
    checked = set()
    for name, scale in stored.items():
        if not name.endswith(("weight_scale", "embedding_scale")):
            continue
        module, _, kind = name.rpartition(".")
        raw = stored[f"{module}.{'weight' if kind == 'weight_scale' else 'embedding_quantized'}"]
        tensor = "embed_tokens.weight" if module == "lm_head" else f"{module}.weight"
        width = wanted[tensor].shape[1]
        bits = 8 * raw.shape[1] // width
        each = 8 // bits
        if bits == 8:
            assert raw.dtype == np.int8
            codes = raw.astype(np.int64)
        else:
            parts = [(raw >> (bits * i)) & ((1 << bits) - 1) for i in range(each)]
            codes = np.stack(parts, axis=-1).reshape(len(raw), -1).astype(np.int64) - (1 << (bits - 1))
        value = codes.astype(np.float32) * np.repeat(scale, width // scale.shape[1], axis=1)
        np.testing.assert_array_equal(value, wanted[tensor], err_msg=name)
        checked.add(bits)
    assert checked == {2, 4, 8}
    assert stored["embed_tokens_per_layer.embedding_scale"].shape == (896, 15)
    again = load(tmp_path / "m")
    for tensor, value in forward_weights(again).items():
        np.testing.assert_array_equal(value, wanted[tensor], err_msg=tensor)
    # Tables cannot keep scales as parameters; everything else is ready for more training.
    assert grids_of(again).keys() == grids_of(model).keys() - {"embed.w", "per_layer.table.w"}
    export(tmp_path / "m", tmp_path / "again", format="mobile", dtype="float32")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


def test_every_source_gives_the_same_files(tmp_path):
    """A model in memory, our own directory, and a bfloat16 export of it: the codes do not care."""
    model = on_policy(random_model("tiny_26b_a4b"), "w4a16")
    save_model(model, tmp_path / "ours")
    export(model, tmp_path / "hf", format="hf", dtype="float32", max_shard_size="300KB")
    for number, source in enumerate((model, tmp_path / "ours", tmp_path / "hf")):
        export(
            source, tmp_path / f"{number}.gguf", format="gguf", tokenizer=assets.TOKENIZER, name="m", dtype="float32"
        )
    first = (tmp_path / "0.gguf").read_bytes()
    assert (tmp_path / "1.gguf").read_bytes() == first
    assert (tmp_path / "2.gguf").read_bytes() == first
    notes = [json.loads((tmp_path / f"{i}.gguf.manifest.json").read_text()) for i in range(3)]
    assert len({note["source"]["sha256"] for note in notes}) == 3
    assert notes[0]["tensors"]["layers.0.self_attn.q_proj.weight"]["relative_error"] == pytest.approx(0.0954, abs=0.004)


def test_a_float_checkpoint_on_a_policy_is_said_to_be_rounded_afterwards(tmp_path):
    model = random_model("tiny_e2b")
    save_model(model, tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "ct", format="compressed-tensors", policy="w4a16")
    assert report.how == "post-training quantisation by policy w4a16"
    trained = policy.snap(on_policy(model, "w4a16"))
    got = arrays(load(tmp_path / "ct", dtype="float32"))
    for name in ("own.full.attention.q.w", "shared.sliding.mlp.down.w"):
        np.testing.assert_array_equal(got[name], arrays(trained)[name])
    assert ("int4_sym7_g32", "int4") in {row[:2] for row in report.rows()}


def refused(match, target, **options):
    """The export fails with one sentence and leaves nothing behind."""
    before = set(target.parent.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        export(target=target, **options)
    assert str(caught.value).count("\n") == 0
    assert set(target.parent.iterdir()) == before


def test_what_is_refused(tmp_path):
    model = on_policy(random_model("tiny_31b"), "q4_0", grid="q4_0")
    float_model = random_model("tiny_31b")
    # 8 in 9 scales of q4_0 need more bits than bfloat16 has.
    refused(r"\d+ of \d+ blocks in \d+ tensors .*q4_0.*bfloat16", tmp_path / "hf", what=model, format="hf")
    refused("no linear layer on a grid", tmp_path / "ct", what=float_model, format="compressed-tensors")
    refused("E2B and E4B", tmp_path / "m", what=model, format="mobile")
    refused(
        "which the mobile format does not hold",
        tmp_path / "m",
        what=on_policy(random_model("tiny_e2b"), "q4_0"),
        format="mobile",
    )
    refused("tokenizer", tmp_path / "m.gguf", what=model, format="gguf")
    refused("ends in .gguf", tmp_path / "m", what=model, format="gguf")
    refused("cannot end in .gguf", tmp_path / "m.gguf", what=model, format="hf")
    refused("did you mean 'gguf'|gguf", tmp_path / "m", what=model, format="ggml")
    refused("policy", tmp_path / "m", what=model, format="hf", policy="w4a17")
    # Trained on one lattice, asked for another.
    refused(r"blocks in \d+ tensors", tmp_path / "ct", what=model, format="compressed-tensors", policy="w4a16")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    refused("exists", tmp_path / "there", what=float_model, format="hf")
    (tmp_path / "m.gguf").write_text("")
    refused("exists", tmp_path / "m.gguf", what=model, format="gguf", tokenizer=assets.TOKENIZER)


@pytest.mark.parametrize("form", ["hf", "compressed-tensors", "mobile"])
def test_towers_go_along_unquantised(form, tmp_path):
    """From the fixture's directory, clip bounds and all."""
    source = load(PROJECT / "tests/golden/media_e2b", dtype="float32")
    name = {"hf": None, "compressed-tensors": "int8", "mobile": "mobile"}[form]
    export(PROJECT / "tests/golden/media_e2b", tmp_path / "out", format=form, dtype="float32", policy=name)  # pyright: ignore[reportArgumentType]
    got = arrays(load(tmp_path / "out", dtype="float32"))
    towers = [key for key in arrays(source) if key.startswith(("vision", "audio"))]
    assert len(towers) > 20
    for key in towers:
        np.testing.assert_array_equal(got[key], arrays(source)[key], err_msg=key)
    assert np.array_equal(got["own.full.mlp.up.w"], arrays(source)["own.full.mlp.up.w"]) == (form == "hf")


def test_requantise_lets_them_through(tmp_path):
    model = on_policy(random_model("tiny_31b"), "q4_0", grid="q4_0")
    report = export(model, tmp_path / "hf", format="hf", requantise=True)
    assert sum(fate.off for fate in report.outcome.fates) > 1000
    assert grids_of(load(tmp_path / "hf")) == {}  # the manifest names a grid that the weights no longer lie on


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embed.w", "own.full.mlp.up.w", "own.sliding.layer_scalar"])
def test_values_that_are_not_finite_are_named(bad, name, tmp_path):
    model = on_policy(random_model("tiny_31b"), "q4_0")
    from gemma4_jax.model.parameters import map_arrays

    def spoil(own, variable):
        value = variable.get_value()
        return value.at[(0,) * value.ndim].set(bad) if own == name else value

    where = {
        "embed.w": "embed_tokens",
        "own.full.mlp.up.w": r"layers\.5\.mlp\.up_proj",
        "own.sliding.layer_scalar": r"layers\.0",
    }
    refused(rf"in {where[name]}.*NaN, infinite", tmp_path / "hf", what=map_arrays(spoil, model), format="hf")


def test_static_activations_that_were_never_calibrated(tmp_path):
    model = policy.apply(random_model("tiny_e2b"), policy.QuantConfig(policy="mobile"))
    refused("never calibrated", tmp_path / "m", what=model, format="mobile")


def test_unknown_methods_and_formats_are_named(tmp_path):
    export(on_policy(random_model("tiny_31b"), "w4a16"), tmp_path / "ct", format="compressed-tensors")
    file = tmp_path / "ct" / "config.json"
    config = json.loads(file.read_text())

    def with_changes(**changes):
        file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))

    with_changes(quant_method="gptq")
    with pytest.raises(UserError, match="quantised by 'gptq'"):
        load(tmp_path / "ct")
    with_changes(format="nvfp4-pack-quantized", config_groups={})
    with pytest.raises(UserError, match="nvfp4-pack-quantized"):
        load(tmp_path / "ct")
    with_changes()
    assert of_path(tmp_path / "ct").grids

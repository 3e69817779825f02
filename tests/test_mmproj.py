"""Towers as llama.cpp's mmproj file: names by the `gguf` package's table, values by its reader, metadata as its loader wants it."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportMissingImports=false, reportOptionalMemberAccess=false

import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT

from gemma4_jax import assets
from gemma4_jax.checkpoint import mmproj
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.checkpoint.names import table
from gemma4_jax.checkpoint.source import of_path
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError

gguf = pytest.importorskip("gguf", reason="comparing needs the gguf package: the extra `dev`")

GOLDEN = PROJECT / "tests" / "golden"
ENDINGS = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")


@functools.cache
def names_of_gguf():
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 128)


def llama_cpp_name(name: str) -> str:
    """What llama.cpp's converter makes of a Hugging Face name: its renaming, and the package's table."""
    if name.startswith(("model.audio_tower.", "model.embed_audio.")):
        name = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
        name += ".weight" if name.endswith("per_dim_scale") else ""
    else:
        name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
        name += ".weight" if name.endswith("position_embedding_table") else ""
    found = names_of_gguf().get_name(name, try_suffixes=ENDINGS)
    assert found is not None, name
    return found


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_names_are_those_of_llama_cpps_converter(variant):
    cfg = ModelConfig.variant(variant, multimodal=True)
    names = [name for name in table(cfg) if name.startswith("model.")]
    assert len(names) > 300
    assert {name: mmproj.mmproj_name(name) for name in names} == {name: llama_cpp_name(name) for name in names}
    with pytest.raises(ValueError, match="has no name"):
        mmproj.mmproj_name("model.vision_tower.something.weight")


@pytest.fixture(scope="module", params=["media_e2b", "media_31b"])
def written(request, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("mmproj") / "mmproj-tiny.gguf"
    mmproj.write_mmproj(of_path(GOLDEN / request.param), path, dtype="float32", name="tiny")
    return request.param, path


def test_values_are_the_checkpoints(written):
    """Every tensor of the towers, read by the gguf package, in the layout llama.cpp's converter gives it."""
    fixture, path = written
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    source, seen = of_path(GOLDEN / fixture), set()
    text = set(source.text_names())
    for name, held in source.tensors.items():
        if name in text:
            continue
        want = np.concatenate([np.asarray(block, np.float32).reshape(-1) for _, block in held.blocks()])
        want, target = want.reshape(held.shape), llama_cpp_name(name)
        if name.endswith("patch_embedder.input_proj.weight"):
            side = int((want.shape[1] // 3) ** 0.5)
            want = want.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        elif name.endswith("per_dim_scale"):
            want = np.log1p(np.exp(want.astype(np.float64))).astype(np.float32)
        elif name.endswith("depthwise_conv1d.weight"):
            want = want[:, 0]
        want = want.reshape(1) if want.shape == () else want
        got = tensors[target]
        assert got.shape == want.shape, name
        np.testing.assert_allclose(got, want, rtol=1e-6 if name.endswith("per_dim_scale") else 0, err_msg=name)
        seen.add(target)
    assert seen == tensors.keys()


def test_metadata_are_what_the_loader_asks_for(written):
    fixture, path = written
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    cfg = of_path(GOLDEN / fixture).cfg
    keys = gguf.Keys
    assert fields[keys.General.ARCHITECTURE] == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ] == "clip"
    assert fields[keys.General.TYPE] == gguf.GGUFType.MMPROJ
    assert fields[keys.ClipVision.PROJECTOR_TYPE] == gguf.VisionProjectorType.GEMMA4V
    assert fields[keys.ClipVision.PROJECTION_DIM] == cfg.hidden_size
    assert fields[keys.ClipVision.BLOCK_COUNT] == cfg.vision.num_hidden_layers
    assert fields[keys.ClipVision.FEED_FORWARD_LENGTH] == cfg.vision.intermediate_size
    assert fields[keys.ClipVision.IMAGE_STD] == [1.0, 1.0, 1.0]
    assert fields[keys.ClipVision.USE_GELU] is True
    assert fields[keys.Clip.HAS_VISION_ENCODER] is True
    assert (keys.Clip.HAS_AUDIO_ENCODER in fields) == (cfg.audio is not None)
    if cfg.audio is not None:
        assert fields[keys.ClipAudio.PROJECTOR_TYPE] == gguf.VisionProjectorType.GEMMA4A
        assert fields[keys.ClipAudio.FEED_FORWARD_LENGTH] == 4 * cfg.audio.hidden_size
        assert fields[keys.ClipAudio.NUM_MEL_BINS] == 128


def test_types_of_a_narrow_file(tmp_path):
    """Matrices in the dtype asked for; norms, bounds, kernels, patches and positions in float32."""
    mmproj.write_mmproj(of_path(GOLDEN / "media_e2b"), tmp_path / "m.gguf", dtype="float16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    exact = ("v.patch_embd.weight", "v.position_embd.weight", "a.conv1d.0.weight", "a.blk.0.conv_dw.weight")
    assert all(kinds[name] == "F32" for name in (*exact, "v.blk.0.ln1.weight", "v.blk.0.attn_q.input_max"))
    narrow = (
        "v.blk.1.attn_q.weight",
        "a.blk.0.conv_pw1.weight",
        "mm.input_projection.weight",
        "a.input_projection.weight",
    )
    assert all(kinds[name] == "F16" for name in narrow)


def test_it_stands_beside_the_text_file_and_neither_without_the_other(tmp_path, monkeypatch):
    from gemma4_jax.checkpoint import gguf as text_file
    from gemma4_jax.checkpoint.store import save_model
    from gemma4_jax.model.parameters import map_arrays
    from gemma4_jax.model.transformer import abstract

    sizes = dict(layer_period=2, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size=64, intermediate_size=64)
    shapes = abstract(ModelConfig.variant("tiny_e2b", multimodal=True, **sizes))
    save_model(map_arrays(lambda _, v: np.ones(v.shape, np.float32), shapes), tmp_path / "model")
    given = {"format": "gguf", "tokenizer": assets.TOKENIZER}
    report = export(tmp_path / "model", tmp_path / "out" / "tiny.gguf", **given)
    assert report.towers == tmp_path / "out" / "mmproj-tiny.gguf"
    assert report.towers.is_file()
    assert export(tmp_path / "model", tmp_path / "text.gguf", text_only=True, **given).towers is None
    (tmp_path / "out" / "tiny.gguf").unlink()
    (tmp_path / "out" / "tiny.gguf.manifest.json").unlink()
    with pytest.raises(UserError, match=r"mmproj-tiny\.gguf.* exists"):
        export(tmp_path / "model", tmp_path / "out" / "tiny.gguf", **given)

    def fails(*_args, **_kwargs):
        raise UserError("no")

    monkeypatch.setattr(text_file, "write_gguf", fails)
    with pytest.raises(UserError, match="no"):
        export(tmp_path / "model", tmp_path / "again.gguf", **given)
    assert not (tmp_path / "mmproj-again.gguf").exists()
    with pytest.raises(UserError, match="no vision or audio tower"):
        mmproj.write_mmproj(of_path(tmp_path / "model", text_only=True), tmp_path / "n.gguf")

"""Towers in checkpoints: bits survive both ways, names and shapes are transformers', text_only leaves them out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PROJECT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma4_jax.checkpoint import names
from gemma4_jax.checkpoint.hf import read_config, save_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import VARIANTS, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.linear import Buffer
from gemma4_jax.model.parameters import arrays, map_arrays, variables
from gemma4_jax.model.transformer import abstract

GOLDEN = PROJECT / "tests" / "golden"
WITH_TOWERS = ("tiny_e2b", "tiny_26b_a4b", "media_e2b", "media_31b")


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for file in path.glob("*.safetensors"):
        found |= {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in load_file(file).items()}
    return found


@pytest.mark.parametrize("fixture", WITH_TOWERS)
def test_transformers_own_files_survive_load_and_save(fixture, tmp_path):
    model = load(GOLDEN / fixture)
    written = raw(save_hf(model, tmp_path / "hf"))
    dead = {names.MULTIMODAL_PREFIX + name for name in names.dead(model.cfg)}
    wanted = {name: value for name, value in raw(GOLDEN / fixture).items() if name not in dead | {names.HEAD}}
    assert any(name.startswith(names.TOWERS) for name in wanted)
    assert written == wanted
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert read_config(tmp_path / "hf") == model.cfg == read_config(GOLDEN / fixture)


@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_31b"])
def test_hf_to_orbax_to_hf_is_bit_identical(variant, tmp_path):
    rng = np.random.default_rng(0)
    cfg = ModelConfig.variant(variant, multimodal=True)
    model = map_arrays(
        lambda _, v: jax.device_put(rng.standard_normal(v.get_value().shape).astype(jnp.bfloat16)),
        abstract(cfg, "bfloat16"),
    )
    first = save_hf(model, tmp_path / "first", max_shard_size="300KB")
    save_model(load(first), tmp_path / "orbax")
    again = load(tmp_path / "orbax")
    assert again.cfg == cfg
    assert raw(first) == raw(save_hf(again, tmp_path / "second"))
    assert isinstance(
        variables(again)["vision.std_bias" if variant == "tiny_31b" else "audio.layers.first.up.input_max"], Buffer
    )


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("tiny_")])
def test_every_element_belongs_to_exactly_one_tensor(variant):
    cfg = ModelConfig.variant(variant, multimodal=True)
    counts = {name: np.zeros(v.get_value().shape, np.int8) for name, v in variables(abstract(cfg)).items()}
    table = names.table(cfg)
    for entry in table.values():
        view = entry.view(counts[entry.parameter][(*entry.index, ...)])
        assert view.shape == entry.shape
        view += 1
    for name, count in counts.items():
        assert (count == 1).all(), name
    text = names.table(ModelConfig.variant(variant))
    assert list(table)[: len(text)] == list(text)
    assert all(name.startswith(names.TOWERS) for name in list(table)[len(text) :])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("tiny_")])
def test_published_configs_have_the_towers_of_the_variants(variant):
    cfg = ModelConfig.variant(variant, multimodal=True)
    for spelling in ("new", "old"):
        published = json.loads((GOLDEN / "configs" / f"{variant}.{spelling}.json").read_text())
        assert ModelConfig.from_hf(published) == cfg
        ours = cfg.to_hf(spelling=spelling)
        for tower in ("vision_config", "audio_config"):
            theirs = published.get(tower) or {}
            for key, value in (ours[tower] or {}).items():
                assert theirs.get(key) == value, key
    assert cfg.text_only() == ModelConfig.variant(variant)


def test_kernels_of_convolutions_are_views_in_the_files_order(tmp_path):
    cfg = ModelConfig.variant("tiny_e2b", multimodal=True)
    table = names.table(cfg)
    entry = table["model.audio_tower.subsample_conv_projection.layer1.conv.weight"]
    own = np.random.default_rng(0).standard_normal((128, 3, 3, 8))
    np.testing.assert_array_equal(entry.view(own), own.transpose(3, 0, 1, 2))
    entry = table["model.audio_tower.layers.1.lconv1d.depthwise_conv1d.weight"]
    own = np.random.default_rng(0).standard_normal((5, 64))
    np.testing.assert_array_equal(entry.view(own), own.T[:, None])


def test_text_only_of_a_whole_checkpoint_and_its_missing_towers(tmp_path):
    whole = load(GOLDEN / "media_31b")
    text = load(GOLDEN / "media_31b", text_only=True)
    assert text.vision is None
    assert text.cfg == whole.cfg.text_only()
    mine, theirs = arrays(text), arrays(whole)
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    directory = save_hf(whole, tmp_path / "hf")
    file = directory / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith(names.TOWERS)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: model.vision_tower.* pass text_only=True"):
        load(directory)
    assert load(directory, text_only=True).cfg == text.cfg
    with safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tower_configs_that_no_model_has(tmp_path):
    base = ModelConfig.variant("tiny_e2b", multimodal=True).to_hf()
    for tower, key, value, message in (
        ("vision_config", "num_key_value_heads", 1, "as many"),
        ("vision_config", "hidden_activation", "relu", "wanted 'gelu_pytorch_tanh'"),
        ("audio_config", "attention_context_right", 2, "attention_context_right=0"),
        ("audio_config", "hidden_size", 63, "must be even"),
        ("vision_config", "head_dim", 6, "multiple of 4"),
    ):
        broken = json.loads(json.dumps(base))
        broken[tower][key] = value
        with pytest.raises(UserError, match=message):
            ModelConfig.from_hf(broken)

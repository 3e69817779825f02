"""docs/media.md: its Python runs as it stands, and its rows are rows; test_docs.py looks at its commands."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT

from gemma4_jax import assets
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.model.transformer import init
from gemma4_jax.processor import Processor

TEXT = (PROJECT / "docs" / "media.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)\n```\n", TEXT, re.DOTALL)
    assert found
    return found


def test_rows_are_rows():
    for block in blocks("json"):
        assert json.loads(block)["messages"]


def test_python_runs_as_it_stands(tmp_path: Path, monkeypatch, capsys):
    """With a small model in place of the trained one, noise in place of the speech, and of the photograph without scikit-image."""
    pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")
    soundfile = pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
    monkeypatch.chdir(tmp_path)
    sizes = dict(layer_period=2, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size=64, intermediate_size=64)
    save_model(init(ModelConfig.variant("tiny_e2b", multimodal=True, **sizes)), tmp_path / "runs" / "tiny_media_sft")
    Processor.load(assets.TOKENIZER).save(tmp_path / "runs" / "tiny_media_sft")
    try:
        import skimage  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        photo = np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8)
        data = types.SimpleNamespace(astronaut=lambda: photo)
        monkeypatch.setitem(sys.modules, "skimage", types.SimpleNamespace(data=data))  # type: ignore[arg-type]
    speech = tmp_path / "runs" / "real" / "moonshine_onnx" / "assets" / "beckett.wav"
    speech.parent.mkdir(parents=True)
    soundfile.write(speech, np.random.default_rng(0).normal(0, 0.1, 160_000), 16_000)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/media.md", "exec"), names)
    assert "(169, 5, 328, 287)" in capsys.readouterr().out
    assert (tmp_path / "runs" / "places.png").is_file()

"""The drafter against transformers' numbers over every cache layout, its config and its files.

Fixtures: tests/golden/drafters.py.
"""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from safetensors.numpy import save_file

from gemma4_jax.checkpoint.drafter import load_drafter, read_drafter_config
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.safetensors_io import read_header
from gemma4_jax.config import ModelConfig
from gemma4_jax.config_drafter import DrafterConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.drafting import Drafting
from gemma4_jax.infer.generate import Completion, SampleConfig
from gemma4_jax.infer.program import run_sample
from gemma4_jax.model.decode import view_of
from gemma4_jax.model.drafter import Drafter, abstract_drafter
from gemma4_jax.model.kv import producers
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.transformer import Transformer
from launch.run import main

GOLDEN = Path(__file__).parent / "golden"
TARGETS = {"drafter_31b": "tiny_31b", "drafter_e2b": "tiny_e2b"}
STEPS, DRAFTS = 3, 4
TOLERANCE = 1e-3  # that of the targets' own fixtures: float32 sums in another order


@functools.cache
def target_of(name: str) -> Transformer:
    return load(GOLDEN / TARGETS[name], dtype="float32", text_only=True)


@functools.partial(quick.jit, static_argnames="layout")
def drafted(target: Transformer, drafter: Drafter, tokens_T, *, layout: str):
    """What the drafter says behind a prompt whose last token the target has not read: logits, ids, hidden of each step."""
    cfg, cache_format = target.cfg, CacheFormat(layout)
    last = (tokens_T >= 0).sum() - 1
    place = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
    read = (jnp.maximum(tokens_T, 0)[None], jnp.where(place < last, place, -1)[None])
    h, cache = target.prefill(*read, 64, DRAFTS + 2, cache_format)
    views = {}
    for kind, index in producers(cfg).items():
        stack = target.own
        layer = stack.full if kind == "full" else stack.sliding
        last_block = -1 if kind == "full" else (-1, -1)
        layer = jax.tree.map(lambda x, at=last_block: x[at], layer)
        views[kind] = view_of(layer, cfg, cache_format, cache.layers[index], cache.positions[kind])
    token, hidden, found = tokens_T[last][None], h[:, last - 1], []
    for _ in range(STEPS):
        state, hidden = drafter.step(
            target.embed.lookup(token[None], "float32")[0], hidden, last.astype(jnp.int32)[None], views
        )
        logits, ids = drafter.scores(state)
        place = logits.argmax(axis=-1)
        token = place.astype(jnp.int32) if ids is None else ids[0, place]
        found.append((logits[0], None if ids is None else ids[0], hidden[0], token))
    return found


def padded(tokens: np.ndarray) -> np.ndarray:
    """To the longest of the prompts, so that one program serves all."""
    return np.concatenate([tokens, np.full(41 - tokens.size, -1, np.int32)])


@pytest.mark.parametrize(
    ("name", "layout"),
    [("drafter_31b", "plain"), ("drafter_31b", "unified"), ("drafter_31b", "rotate_on_read"), ("drafter_e2b", "plain")],
)
def test_the_drafter_says_what_transformers_says(name: str, layout: str):
    drafter = load_drafter(GOLDEN / name, dtype="float32")
    assert (drafter.centroids is not None) == (name == "drafter_e2b")
    with np.load(GOLDEN / name / "expected.npz") as stored:
        wanted = dict(stored)
    for prompt in range(2):
        want = {key: wanted[f"{prompt}/{key}"] for key in ("tokens", "drafts", "logits", "hidden")}
        for step, (logits, ids, hidden, token) in enumerate(
            drafted(target_of(name), drafter, padded(want["tokens"]), layout=layout)
        ):
            assert token[0] == want["drafts"][step]
            np.testing.assert_allclose(hidden, want["hidden"][step], atol=TOLERANCE)
            scored = want["logits"][step]
            if ids is not None:
                # The reference writes one value below the smallest to what is not scored; the smallest itself is drafted by nobody.
                assert ids.size == 80
                assert set(np.flatnonzero(np.isfinite(scored))) == set(np.asarray(ids).tolist())
                scored = scored[np.asarray(ids)]
            np.testing.assert_allclose(logits, scored, atol=TOLERANCE)


def test_configs_of_the_published_drafters_and_their_tiny_twins():
    e2b, large = DrafterConfig.variant("e2b"), DrafterConfig.variant("31b")
    assert count(e2b) == pytest.approx(78e6, rel=0.02)
    assert count(large) == pytest.approx(0.47e9, rel=0.02)
    assert (e2b.num_centroids, e2b.centroid_intermediate_top_k, large.num_centroids) == (2048, 32, 0)
    for name in ("e2b", "e4b", "26b_a4b", "31b"):
        for variant in (name, f"tiny_{name}"):
            DrafterConfig.variant(variant).check_target(ModelConfig.variant(variant, multimodal=True))
    assert read_drafter_config(GOLDEN / "drafter_e2b").centroid_intermediate_top_k == 5
    with pytest.raises(UserError, match="Unknown drafter variant 'e2'; did you mean 'e2b'"):
        DrafterConfig.variant("e2")


def count(cfg: DrafterConfig) -> int:
    """Parameters."""
    return sum(x.size for x in jax.tree.leaves(abstract_drafter(cfg)) if x.dtype == jnp.float32)


def changed(directory: Path, *, config=None, tensors=None) -> Path:
    """A copy of a drafter with another config or other tensors (None: left out)."""
    shutil.copytree(GOLDEN / "drafter_e2b", directory)
    if config is not None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        path = directory / "model.safetensors"
        values = {name: tensor.values() for name, tensor in read_header(path).items()} | tensors
        save_file({name: value for name, value in values.items() if value is not None}, path)
    return directory


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(config={"model_type": "gemma4"}), "model_type 'gemma4'; wanted 'gemma4_assistant'"),
        (dict(config={"text_config": 3}), "config.json has no text_config"),
        (dict(config={"num_centroids": "many"}), "num_centroids must be a whole number from 1, got 'many'"),
        (dict(config={"num_centroids": 3}), "num_centroids=3 must divide the vocabulary of 320 tokens"),
        (dict(config={"backbone_hidden_size": 96}), r"pre_projection.weight \(wanted \[32, 192\], got \[32, 128\]\)"),
        (dict(tensors={"model.norm.weight": None}), "1 missing: model.norm.weight"),
        (dict(tensors={"model.nose.weight": np.ones(3, np.float32)}), "1 unexpected: model.nose.weight"),
        (
            dict(tensors={"masked_embedding.token_ordering": np.zeros(320, np.int64)}),
            "must name each of 320 tokens once",
        ),
        (dict(tensors={"lm_head.weight": np.ones((320, 32), np.float32)}), "a drafter's head is tied"),
    ],
)
def test_broken_drafters_are_refused_in_a_sentence(tmp_path: Path, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        load_drafter(changed(tmp_path / "drafter", **change))


def test_a_drafter_of_another_size_names_the_right_one():
    published = DrafterConfig.variant("e2b")
    sentence = "a model of width 1536 \\(E2B\\), and this one has 5376; take google/gemma-4-31B-it-assistant"
    with pytest.raises(UserError, match=sentence):
        published.check_target(ModelConfig.variant("31b"))
    with pytest.raises(UserError, match="its vocab_size is 896, the model's 1000"):
        DrafterConfig.variant("tiny_e2b").check_target(ModelConfig.variant("tiny_e2b", vocab_size=1000))
    with pytest.raises(UserError, match="'/nowhere' does not exist"):
        load_drafter("/nowhere")


def test_the_task_sample_refuses_a_drafter_of_another_model(capsys: pytest.CaptureFixture):
    options = ["--config.model.path=none", "--config.model.variant=tiny_e2b", "--config.mesh.devices=1"]
    for drafter, sentence in (
        (GOLDEN / "drafter_31b", "sample.drafter: The drafter was made for a model of width 64, and this one has 128."),
        (GOLDEN / "tiny_e2b", "wanted 'gemma4_assistant', a drafter such as google/gemma-4-E2B-it-assistant."),
    ):
        assert main(["--config=configs/tiny_sample.py", *options, f"--config.sample.drafter={drafter}"]) == 1
        assert sentence in capsys.readouterr().err
    with pytest.raises(UserError, match=r"sample\.draft_tokens lies in 1 to 16, got 0"):
        SampleConfig(draft_tokens=0)


def test_the_report_says_how_the_guesses_fared():
    work = Drafting(load_drafter(GOLDEN / "drafter_31b"), 4, drafted=200, accepted=122, rounds=60, given=182)
    answers = [Completion("yes", [5, 6], [0.0, 0.0], "stop")]
    sampler = SimpleNamespace(generate=lambda *_, **__: answers, stop_ids=(), engine=SimpleNamespace(drafting=work))
    lines: list[str] = []
    run_sample(sampler, ["Is it?"], SampleConfig(), write=lines.append)
    assert lines[-1].endswith("tokens/s; 61% of 200 guesses held, 3.0 tokens a pass")

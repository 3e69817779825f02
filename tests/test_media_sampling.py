"""Answers about pictures and sounds: the engine against transformers' tokens, however it is cut; kept beginnings; what compiles."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import dataclasses
import functools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from media_golden import golden, pieces_of, recipes
from test_engine import compilations, run

from gemma4_jax import assets
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer import senses
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.infer.prompts import PromptConfig, read_prompts
from gemma4_jax.infer.request import Request
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.infer.senses import Senses
from gemma4_jax.media.frontend import FrontEnd, MediaConfig
from gemma4_jax.media.pieces import ImagePiece
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.processor import Processor

CASES = [(fixture, case) for fixture, cases in recipes.USED.items() for case in cases]
GREEDY = Rule(temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast() -> Iterator[None]:
    """The tests are nearly all compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def machine_of(fixture: str) -> Engine:
    """Chunks shorter than a picture, so that one is met half way; prompts side by side, or beginnings that are kept."""
    slots, cache = (2, CacheConfig()) if fixture == "media_e2b" else (1, CacheConfig(prefix_mb=10))
    machine = Engine(golden(fixture).model, slots=slots, max_length=400, chunk=16, cache=cache)
    machine.reserve(400)
    return machine


def requests_of(fixture: str, case: str) -> list[Request]:
    g = golden(fixture)
    ids, mask = g.numbers[f"{case}/input_ids"], g.numbers[f"{case}/attention_mask"] == 1
    count = g.numbers[f"{case}/greedy_tokens"].shape[1]
    rows = zip(ids, mask, pieces_of(fixture, case), strict=True)
    return [Request(row[real].tolist(), count, GREEDY, media=tuple(pieces)) for row, real, pieces in rows]


@pytest.mark.parametrize(("fixture", "case"), CASES)
def test_greedy_tokens_are_transformers(fixture, case):
    """Prompts in chunks of 16, which no picture of 31b may be split by; with what is kept of prompts before."""
    machine, wanted = machine_of(fixture), golden(fixture).numbers[f"{case}/greedy_tokens"]
    found = run(machine, requests_of(fixture, case))
    np.testing.assert_array_equal([one.tokens for one in found], wanted)
    assert not any(one.soft for one in found)


def test_a_beginning_is_not_taken_for_one_with_another_picture():
    """The same tokens, another picture: nothing from the picture on is reused; the same pictures: all but the end is."""
    machine, wanted = machine_of("media_31b"), golden("media_31b").numbers["images/greedy_tokens"][0]
    request = requests_of("media_31b", "images")[0]
    first = request.media[0]
    changed = dataclasses.replace(first, cells=255 - first.cells)
    other = dataclasses.replace(request, media=(changed, *request.media[1:]))
    assert (request.keys != other.keys).sum() == first.count
    assert (other.keys[first.start : first.start + first.count] < 0).all()
    machine.prefixes.clear()
    (plain,) = run(machine, [request])
    (answer,) = run(machine, [other])
    assert plain.reused == 0
    assert answer.reused <= first.start
    assert answer.tokens != plain.tokens
    (kept,) = run(machine, [dataclasses.replace(request, tokens=[*request.tokens, *plain.tokens, 5])])
    assert kept.reused >= len(request.tokens)
    np.testing.assert_array_equal(plain.tokens, wanted)


def test_no_picture_that_sees_itself_whole_is_split():
    request = requests_of("media_31b", "images")[0]
    first, second = request.media
    seeing = Senses(golden("media_31b").model.cfg, 1, 32)
    assert seeing.whole(request, 0, first.start + 1) == first.start
    assert seeing.whole(request, first.start, 2) == first.count  # longer than a chunk: read at once
    assert seeing.whole(request, first.start, first.count + 3) == first.count + 3
    assert seeing.whole(request, 0, second.start + 1) == second.start
    causal = Senses(golden("media_e2b").model.cfg, 1, 32)
    assert causal.whole(request, 0, first.start + 1) == first.start + 1


CFG = ModelConfig.variant(
    "tiny_e2b", multimodal=True, layer_period=2, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size=64,
    intermediate_size=64, head_dim=16, global_head_dim=32, sliding_window=16, hidden_size_per_layer_input=8,
)  # fmt: skip


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
    """Random weights by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)

    def value(name, variable):
        shape = variable.shape
        return jnp.asarray(rng.normal(0, 0.1, shape) if name.endswith(".w") else np.ones(shape), jnp.float32)

    return map_arrays(value, abstract(cfg))


@functools.cache
def sampler_of() -> Sampler:
    config = MediaConfig(image_tokens=70, num_frames=3)
    processor = Processor.load(assets.TOKENIZER).with_front_end(FrontEnd(CFG.vision, CFG.audio, config))
    return Sampler(model_of(CFG), processor, max_length=512, batch_size=2)


def part(rng: np.random.Generator) -> dict:
    """A picture or a sound of any size."""
    if rng.uniform() < 0.3:
        return {"type": "audio", "array": rng.normal(0, 0.1, rng.integers(2000, 40_000)).astype(np.float32)}
    budget = int(rng.choice([70, 140]))
    pixels = rng.integers(0, 256, (*rng.integers(8, 200, 2), 3)).astype(np.uint8)
    return {"type": "image", "array": pixels, "max_soft_tokens": budget}


def test_nothing_compiles_after_warm_up_whatever_pictures_come(monkeypatch):
    """With two sizes of pictures and of sounds in place of five and four: each is a program of its own."""
    monkeypatch.setattr(senses, "BUDGETS", (70, 140))
    monkeypatch.setattr(senses, "FRAMES", (100, 300))
    processor, rng = sampler_of().processor, np.random.default_rng(0)
    assert processor is not None
    machine = Engine(model_of(CFG), slots=1, max_length=512, chunk=16)
    machine.warm_up()
    with compilations() as compiled:
        for count in (1, 3, 0, 2):
            content = [*(part(rng) for _ in range(count)), {"type": "text", "text": "What is it?"}]
            example = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)
            run(machine, [Request(example.tokens.tolist(), 3, GREEDY, media=example.media or ())])
        assert compiled == []


def test_a_model_of_text_refuses_media_in_a_sentence():
    pixels = np.zeros((50, 50, 3), np.uint8)
    chat = [{"role": "user", "content": [{"type": "image", "array": pixels}, {"type": "text", "text": "What?"}]}]
    text_model = model_of(dataclasses.replace(CFG, vision=None, audio=None))
    assert sampler_of().processor is not None
    sampler = Sampler(text_model, sampler_of().processor, max_length=256, batch_size=1)
    with pytest.raises(UserError, match=r"prompts\[0\]: the prompt has images, but this model has no vision tower"):
        sampler.generate([chat], max_new_tokens=2)
    piece = ImagePiece(np.zeros((4, 4, 48), np.uint8), 2, 70)
    with pytest.raises(UserError, match="cut for another model"):
        sampler_of().engine.check(Request([5, 6, 7, 8, 9], 2, GREEDY, media=(piece,)))
    piece = dataclasses.replace(piece, cells=np.zeros((4, 9, 768), np.uint8))
    with pytest.raises(UserError, match="ends with a picture"):
        sampler_of().engine.check(Request([5, 6, 7, 8, 9], 2, GREEDY, media=(piece.at(1),)))


def test_a_processor_without_towers_gets_the_models():
    sampler = Sampler(model_of(CFG), Processor.load(assets.TOKENIZER), max_length=128)
    assert sampler.processor is not None
    assert sampler.processor.front_end.vision == CFG.vision


def test_media_on_the_command_line_come_before_each_text(tmp_path):
    config = PromptConfig(text="What?", images=("a.png", "b.png"), audio=("c.wav",), video=("d.mp4",))
    (prompt,) = read_prompts(config)
    kinds = [(part["type"], part.get("path")) for part in prompt["messages"][0]["content"]]
    wanted = [("image", "a.png"), ("image", "b.png"), ("audio", "c.wav"), ("video", "d.mp4"), ("text", None)]
    assert kinds == wanted
    with pytest.raises(UserError, match=r"prompts.images has no place: prompts.raw continues bare text"):
        PromptConfig(text="What?", images=("a.png",), raw=True)


def test_the_sample_task_shows_pictures_and_roots_chat_files(tmp_path, capsys):
    """From the command line any picture; from a file of chats only what lies beside it."""
    from PIL import Image

    from gemma4_jax.checkpoint.store import save_model
    from launch.run import main

    save_model(model_of(CFG), tmp_path / "model")
    Image.new("RGB", (60, 90), "blue").save(tmp_path / "blue.png")
    (tmp_path / "chats").mkdir()
    content = [{"type": "image", "path": "../blue.png"}, {"type": "text", "text": "Which colour?"}]
    row = json.dumps({"messages": [{"role": "user", "content": content}]})
    (tmp_path / "chats" / "chats.jsonl").write_text(row + "\n")
    common = [
        *("--config=configs/tiny_sample.py", f"--config.model.path={tmp_path}/model", "--config.mesh.devices=1"),
        *("--config.sample.max_new_tokens=2", "--config.sample.max_length=256", "--config.media.image_tokens=70"),
    ]
    assert main([*common, f"--config.prompts.images={tmp_path}/blue.png", "--config.prompts.text=Which colour?"]) == 0
    assert "user: <image> Which colour?" in capsys.readouterr().out
    assert main([*common, "--config.prompts.text=none", f"--config.prompts.chat={tmp_path}/chats/chats.jsonl"]) == 1
    assert "'../blue.png' lies outside the media root" in capsys.readouterr().err

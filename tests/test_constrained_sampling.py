"""A model whose weights say nothing writes valid JSON and valid calls when it is held to them, beside others that are not."""

import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import assets
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.agent import run_agent
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.infer.output_form import FormConfig
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import abstract
from gemma4_jax.processor import Processor

pytest.importorskip("llguidance", reason="structured output is the extra [structured]")

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "c": {"enum": ["red", "blue"]}},
    "required": ["n", "c"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
TOOLS = [{"type": "function", "function": {"name": "step", "parameters": PARAMETERS}}]


@functools.cache
def sampler() -> Sampler:
    processor = Processor.load(assets.TOKENIZER)
    cfg = ModelConfig.variant(
        "tiny_e2b",
        vocab_size=processor.vocab_size,
        hidden_size=64,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_period=2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
    )
    rng = np.random.default_rng(0)
    model = map_arrays(lambda _, v: jnp.asarray(rng.normal(0, 0.15, v.get_value().shape), jnp.float32), abstract(cfg))
    return Sampler(model, processor, max_length=512, batch_size=4)


def test_every_answer_obeys_its_schema():
    answers = sampler().generate([HELLO, "hello", HELLO, HELLO], schema=SCHEMA, max_new_tokens=200, temperature=1.5)
    for answer in answers:
        assert answer.finish_reason == "stop"
        said = json.loads(answer.text)
        assert set(said) == {"n", "c"}
        assert 0 <= said["n"] <= 99
        assert said["c"] in ("red", "blue")
    assert len({answer.text for answer in answers}) > 1
    (again,) = sampler().generate([HELLO], schema=SCHEMA, max_new_tokens=200, temperature=1.5)
    assert again.tokens == answers[0].tokens  # whatever runs beside it
    (short,) = sampler().generate([HELLO], regex="[ab]{3}", stop=[], max_new_tokens=20)
    assert re.fullmatch("[ab]{3}", short.text)
    assert short.finish_reason == "stop"


def test_free_answers_beside_held_ones():
    free = sampler().generate([HELLO, HELLO], max_new_tokens=12, temperature=0.0, stop=[])
    held = sampler().stream(HELLO, schema=SCHEMA, max_new_tokens=200, seed=3)
    beside = sampler().generate([HELLO, HELLO], max_new_tokens=12, temperature=0.0, stop=[])
    assert [answer.tokens for answer in beside] == [answer.tokens for answer in free]
    json.loads("".join(held))


def test_calls_and_thoughts():
    prompt = {"messages": HELLO, "tools": TOOLS}
    stream = sampler().stream(
        prompt,
        tool_choice="required",
        parallel_tool_calls=False,
        enable_thinking=True,
        thinking_budget=4,
        max_new_tokens=99,
    )
    events = list(stream.events())
    (call,) = [event.call for event in events if event.kind == "tool_call"]
    assert call is not None
    assert call["name"] == "step"
    assert 0 <= call["arguments"]["n"] <= 9
    assert stream.completion().tool_calls == [call]
    assert {event.kind for event in events} <= {"thought", "tool_call", "stop"}

    def step(n: int) -> int:
        """One more."""
        return n + 1

    run = run_agent(
        sampler(), HELLO, [step], max_turns=1, tool_choice="step", parallel_tool_calls=False, max_new_tokens=400
    )
    assert run.reason == "max_turns"
    assert run.messages[-1]["tool_calls"][0]["function"]["name"] == "step"


def test_one_bad_prompt_of_many():
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]
    prompts = [{"messages": HELLO, "tools": bad}, {"messages": HELLO, "tools": TOOLS}]
    form = {"tool_choice": "required", "parallel_tool_calls": False}
    with pytest.raises(UserError, match=r"prompts\[0\]: .*'strin'"):
        sampler().generate(prompts, max_new_tokens=99, tool_choice="required")
    failed, fine = sampler().generate(prompts, max_new_tokens=99, on_error="keep", **form)  # pyright: ignore[reportArgumentType]
    assert (failed.finish_reason, fine.finish_reason) == ("error", "stop")
    assert "strin" in failed.error
    assert fine.tool_calls
    with pytest.raises(UserError, match="one of schema, regex and grammar"):
        sampler().generate([HELLO], schema={}, regex="a")
    with pytest.raises(UserError, match="needs tools"):
        sampler().generate(["text"], tool_choice="required")


def test_form_of_a_config(tmp_path):
    file = tmp_path / "schema.json"
    with pytest.raises(UserError, match="cannot be read"):
        FormConfig(schema=str(file))
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        FormConfig(schema=str(file))
    file.write_text(json.dumps(SCHEMA))
    options = FormConfig(schema=str(file), thinking_budget=3).options()
    assert (options.get("schema"), options.get("thinking_budget")) == (SCHEMA, 3)
    with pytest.raises(UserError, match="one of schema, regex and grammar"):
        FormConfig(schema=str(file), regex="a")

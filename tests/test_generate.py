"""The Sampler: kinds of prompts, order, stops, what becomes of an answer, and every refusal."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import assets
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.infer.generate import Completion, SampleConfig, Sampler
from gemma4_jax.infer.program import run_sample
from gemma4_jax.infer.prompts import Prompt, PromptConfig, conversation, encode_prompt, read_prompts
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.infer.text import TextStream
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.processor import Processor

PROCESSOR = Processor.load(assets.TOKENIZER)
VOCAB = PROCESSOR.vocab_size
HELLO = [{"role": "user", "content": "hello"}]
NEW = 40  # more than one chunk of decoding


@functools.cache
def model_of() -> Transformer:
    """The smallest E2B there is: one block of two layers with keys and values, one that shares them."""
    cfg = ModelConfig.variant(
        "tiny_e2b",
        vocab_size=VOCAB,
        hidden_size=64,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_period=2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
    )
    rng = np.random.default_rng(0)
    return map_arrays(lambda _, v: jnp.asarray(rng.normal(0, 0.15, v.get_value().shape), jnp.float32), abstract(cfg))


@functools.cache
def sampler() -> Sampler:
    return Sampler(model_of(), PROCESSOR, max_length=96, batch_size=4)


def ids_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(110, VOCAB, length).tolist() for length in lengths]


@functools.cache
def greedy() -> Completion:
    """A greedy answer that nothing ends early."""
    return sampler().generate(ids_of(20), max_new_tokens=NEW, temperature=0.0, stop=[])[0]


def test_order_seeds_and_batch_mates():
    prompts = ids_of(24, 3, 17, 9, 20)
    first = sampler().generate(prompts, max_new_tokens=NEW, seed=1, stop=[])
    assert [len(answer.tokens) for answer in first] == [NEW] * 5
    assert sampler().generate(prompts, max_new_tokens=NEW, seed=1, stop=[]) == first
    other = sampler().generate(prompts, max_new_tokens=NEW, seed=2, stop=[])
    assert all(a.tokens != b.tokens for a, b in zip(first, other, strict=True))
    fewer = sampler().generate(prompts[:3], max_new_tokens=NEW, seed=1, stop=[])  # other mates, another batch
    assert [answer.tokens for answer in fewer] == [answer.tokens for answer in first[:3]]
    same = sampler().generate([prompts[0]] * 2, max_new_tokens=NEW, seed=1, stop=[])
    assert same[0].tokens == first[0].tokens != same[1].tokens


def test_default_rule_is_the_published_one():
    explicit: dict[str, Any] = dict(temperature=1.0, top_k=64, top_p=0.95, min_p=0.0, seed=0)
    default = sampler().generate(ids_of(20), max_new_tokens=8, stop=[])
    assert default == sampler().generate(ids_of(20), max_new_tokens=8, stop=[], **explicit)
    config = SampleConfig()
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (1.0, 64, 0.95, 0.0)


def test_stop_ids():
    assert sampler().stop_ids == PROCESSOR.stop_ids
    whole = greedy()
    assert (whole.finish_reason, len(whole.tokens), len(whole.logprobs)) == ("length", NEW, NEW)
    place = max(i for i, token in enumerate(whole.tokens) if token not in whole.tokens[:i])
    (stopped,) = sampler().generate(ids_of(20), max_new_tokens=NEW, temperature=0.0, stop=[whole.tokens[place]])
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == whole.tokens[: place + 1]
    assert stopped.logprobs == whole.logprobs[: place + 1]
    assert stopped.text == PROCESSOR.decode(whole.tokens[:place])


@pytest.mark.parametrize("earliest", [3, 32, 33])  # in the first chunk of decoding, across its end, in the second
def test_stop_texts(earliest: int):
    """The text ends before the stop text, the tokens with the one that completed it."""
    generate = functools.partial(sampler().generate, ids_of(20), max_new_tokens=NEW, top_k=0, top_p=1.0, seed=12)
    (whole,) = generate(stop=[])
    pairs = [(i, PROCESSOR.decode(whole.tokens[i : i + 2])) for i in range(earliest, NEW - 1)]
    place, stop = next(
        (i, t) for i, t in pairs if t.isprintable() and "<" not in t and "\ufffd" not in t and whole.text.count(t) == 1
    )
    (stopped,) = generate(stop=["never written", stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.tokens == whole.tokens[: place + 2]
    assert stopped.logprobs == whole.logprobs[: place + 2]


def test_kinds_of_prompts():
    encode = functools.partial(encode_prompt, processor=PROCESSOR, vocab_size=VOCAB, enable_thinking=False)
    bos = PROCESSOR.tokenizer.special.bos
    assert encode("say it").tokens == [bos, *PROCESSOR.tokenizer.encode("say it")]
    assert encode("<bos>say it").tokens == encode("say it").tokens
    want = PROCESSOR.encode(HELLO, add_generation_prompt=True).tokens.tolist()
    assert encode(HELLO).tokens == encode({"messages": HELLO}).tokens == want
    assert encode(HELLO).chat
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    assert len(encode({"messages": HELLO, "tools": [tool]}).tokens) > len(want)
    assert encode(np.array([5, 6], np.int32)).tokens == [5, 6]
    assert encode_prompt(HELLO, PROCESSOR, VOCAB, True).tokens != want


@pytest.mark.parametrize("by_text", [False, True])
def test_a_chat_answer_is_parsed(by_text: bool):
    written = '<|channel>thought\nhm<channel|>well<|tool_call>call:f{a:1,b:<|"|>x<|"|>}<tool_call|>'
    stop = PROCESSOR.tokenizer.id_of("<|tool_response>")
    tokens = PROCESSOR.tokenizer.encode(written + ("END" if by_text else ""))
    request = Request([5], 200, Rule(), stop_ids=(stop,), stop_texts=("END",), decode=PROCESSOR.decode)
    running = Running(request)
    for token in [*tokens, stop]:
        if not running.done:
            running.take(token, 0.0)
    chat, raw = (sampler().completed(running, chat) for chat in (True, False))
    assert (chat.text, chat.thought, chat.finish_reason) == ("well", "hm", "stop")
    assert chat.tool_calls == [{"name": "f", "arguments": {"a": 1, "b": "x"}}]
    assert (raw.text, raw.tool_calls) == (written, [])
    assert "".join(running.pieces) == written


def test_a_stream_gives_the_same_text_in_whole_characters():
    (whole,) = sampler().generate(ids_of(20), max_new_tokens=NEW, temperature=2.0, top_k=0, top_p=1.0, seed=4, stop=[])
    stream = sampler().stream(ids_of(20)[0], max_new_tokens=NEW, temperature=2.0, top_k=0, top_p=1.0, seed=4, stop=[])
    beside = sampler().stream(ids_of(9)[0], max_new_tokens=NEW, temperature=0.0, stop=[])
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == whole.text
    assert (stream.completion().tokens, stream.completion().text) == (whole.tokens, whole.text)
    assert (
        beside.completion().tokens
        == sampler().generate(ids_of(9), max_new_tokens=NEW, temperature=0.0, stop=[])[0].tokens
    )
    # More than two calls of the decoder's program, or everything is written before anybody leaves.
    with sampler().stream(ids_of(20)[0], max_new_tokens=76, temperature=0.0, stop=[]) as ids:
        assert [token for token, _ in zip(ids.tokens(), range(7), strict=False)] == greedy().tokens[:7]
    assert ids.running.reason == "cancelled"
    assert sampler().engine.idle


@pytest.mark.parametrize("stops", [(), ("lo",), ("\u00fc\u00df", "zz"), ("\U0001f600",)])
def test_text_pieces_at_every_split(stops: tuple[str, ...]):
    """Characters of one to four bytes, each byte a token; a stop text comes whole or not at all."""
    text = "hel\u00fc\u00dfl lo \u65e5\u672c \U0001f600 z z end"
    ids = list(text.encode())
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stops)
    pieces = [stream.add(token) for token in ids] + [stream.close()]
    places = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text == text[: min(places, default=len(text))]
    assert stream.stopped == bool(places)
    assert not any("\ufffd" in piece for piece in pieces)
    held = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), ("stop",))
    assert [held.add(token) for token in b"a sto"] == ["a", " ", "", "", ""]
    assert (held.close(), held.stopped) == ("sto", False)


def test_bad_prompts_become_errors_beside_the_answers_of_others():
    prompts: list[Prompt] = [ids_of(20)[0], [], ids_of(90)[0], ids_of(3)[0]]
    answers = sampler().generate(prompts, max_new_tokens=NEW, temperature=0.0, stop=[], on_error="keep")
    assert [answer.finish_reason for answer in answers] == ["length", "error", "error", "length"]
    assert answers[0].tokens == greedy().tokens
    assert answers[1].error == "it is empty; give at least one token or message."
    assert "would pass max_length=96" in answers[2].error
    with pytest.raises(UserError, match=r"prompts\[1\]: it is empty"):
        sampler().generate(prompts, max_new_tokens=NEW)


def test_without_a_processor_ids_come_and_go():
    plain = Sampler(model_of(), max_length=96, batch_size=4)
    (answer,) = plain.generate(ids_of(20), max_new_tokens=NEW, temperature=0.0)
    assert (answer.tokens, answer.text, plain.stop_ids) == (greedy().tokens, "", ())
    assert plain.generate([]) == []


def test_the_last_token_fits_exactly():
    (answer,) = sampler().generate(ids_of(56), max_new_tokens=NEW, temperature=0.0, stop=[])
    assert len(answer.tokens) == NEW


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        (["x", ""], {}, "prompts[1]: it is empty; give at least one character."),
        ([[]], {}, "prompts[0]: it is empty; give at least one token or message."),
        ([[5] * 90], {}, "prompts[0]: the prompt has 90 tokens, and with max_new_tokens=8 would pass max_length=96;"),
        ([[5, VOCAB]], {}, f"prompts[0]: token ids run from 0 to {VOCAB - 1}, got {VOCAB}."),
        ([[5, "x"]], {}, "prompts[0]: a list must hold token ids (integers) or messages (mappings) only."),
        ([[True]], {}, "prompts[0]: a list must hold token ids"),
        ([3.0], {}, "prompts[0]: it is text, a conversation or a list of token ids, got float."),
        (HELLO, {}, 'prompts[0]: a mapping must have the key "messages", got the keys role, content;'),
        ("hello", {}, "prompts is a list; put the one text in brackets."),
        ([[{"role": "usr", "content": "x"}]], {}, "prompts[0]: messages[0] has the unknown role 'usr'"),
        (["x"], {"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0."),
        (["x"], {"temperature": -1}, "temperature is 0 (greedy) or a positive number, got -1."),
        (["x"], {"seed": -1}, "seed lies in 0 to 2^32 - 1, got -1."),
        (["x"], {"stop": "\n"}, "stop is a list of texts and ids, got the text '\\n'; put it in brackets."),
        (["x"], {"stop": [""]}, "a stop text must not be empty."),
        (["x"], {"stop": [VOCAB]}, f"stop ids run from 0 to {VOCAB - 1}, got {VOCAB}."),
    ],
)
def test_refusals(prompts: Any, options: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as caught:
        sampler().generate(prompts, **{"max_new_tokens": 8, **options})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_refusals_of_the_sampler():
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_length": 4096}, "max_length lies in 2 to the model's context, 2048, got 4096."),
        ({"batch_size": 0}, "batch_size is at least 1, got 0."),
    )
    for options, sentence in refused:
        with pytest.raises(UserError) as caught:
            Sampler(model_of(), PROCESSOR, **options)
        assert str(caught.value) == sentence
    other = abstract(ModelConfig.variant("tiny_e2b", vocab_size=VOCAB + 1))
    with pytest.raises(UserError, match=f"tokenizer has {VOCAB} pieces and the model {VOCAB + 1}"):
        Sampler(other, PROCESSOR)
    with pytest.raises(ValueError, match="make a new Sampler"):
        sampler().update(other)
    with pytest.raises(UserError, match="needs a processor"):
        Sampler(model_of()).generate(["text"])
    with pytest.raises(UserError, match="needs a processor"):
        Sampler(model_of()).generate([[5]], stop=["text"])
    with pytest.raises(UserError, match=r"sample\.batch_size is at least 1"):
        SampleConfig(batch_size=0)


def test_prompts_from_files(tmp_path):
    texts, chats, tools = (tmp_path / name for name in ("p.txt", "p.jsonl", "tools.json"))
    texts.write_text("one\n\ntwo\n")
    chats.write_text(json.dumps({"messages": HELLO, "task": "greet"}) + "\n")
    tools.write_text("[]")
    one = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}], "tools": []}
    found = read_prompts(PromptConfig(file=str(texts), system="be brief", tools=str(tools)))
    assert (found[0], len(found)) == (one, 2)
    assert read_prompts(PromptConfig(text="one", raw=True)) == ["one"]
    assert read_prompts(PromptConfig(chat=str(chats))) == [{"messages": HELLO, "task": "greet"}]
    for content, sentence in (
        ("{", "p.jsonl:1 is not JSON"),
        ("{}", 'p.jsonl:1 must be an object with the key "messages"'),
    ):
        chats.write_text(content)
        with pytest.raises(UserError, match=sentence):
            conversation(FileRows([str(chats)])[0])
    tools.write_text("{}")
    with pytest.raises(UserError, match="must hold a list of function tools, got dict"):
        read_prompts(PromptConfig(text="x", tools=str(tools)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "prompts wants exactly one of text, file and chat, got none."),
        ({"text": "x", "chat": "y"}, "prompts wants exactly one of text, file and chat, got text and chat."),
        ({"chat": "y", "system": "s"}, "prompts.system has no place: the rows of prompts.chat have their own."),
        ({"text": "y", "raw": True, "tools": "t"}, "prompts.tools has no place: prompts.raw continues bare text."),
        ({"chat": "y", "raw": True}, "prompts.raw is for text and file; the rows of prompts.chat are conversations."),
    ],
)
def test_prompt_settings_that_contradict(options: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as caught:
        PromptConfig(**options)
    assert str(caught.value) == sentence


def test_the_program_prints_and_writes(tmp_path):
    lines: list[str] = []
    output = tmp_path / "new" / "answers.jsonl"
    config = SampleConfig(max_new_tokens=8, temperature=0.0, batch_size=4)
    prompts: list[Prompt] = [{"messages": HELLO, "tools": None}, "raw text"]
    answers = run_sample(sampler(), prompts, config, output=str(output), write=lines.append)
    text = "\n".join(lines)
    assert "[1/2] user: hello\n" in text
    assert "[2/2] raw text\n" in text
    assert lines[-1].startswith(f"\n2 answers, {sum(len(a.tokens) for a in answers)} tokens in ")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [answer.tokens for answer in answers]
    assert rows[0]["messages"] == HELLO
    assert rows[1]["prompt"] == "raw text"
    with pytest.raises(UserError, match="The answers cannot be written to"):
        run_sample(sampler(), prompts, config, output=str(tmp_path), write=lines.append)

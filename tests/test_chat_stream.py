"""However the ids of an output are split, its parse is the same, and the streamed texts joined are the parse.

50 transcripts a tokenizer, made the same way every time: conversations (the project's own, or BFCL's) written by the chat
writer, random texts with characters that take several byte pieces, and outputs cut off or malformed.
"""

import json
import random

import pytest

from gemma4_jax import assets, chat
from gemma4_jax.chat_parse import Parsed, StreamParser, parse
from gemma4_jax.chat_text import TextDecoder, byte_ids
from gemma4_jax.processor import Processor
from gemma4_jax.tokenizer import Tokenizer

USER = {"role": "user", "content": "?"}
ALPHABET = "abc .,\n\té߿€한🙂👩‍👩‍👧�\x00<>|{}[]:"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.TOKENIZER)


@pytest.fixture(scope="module")
def published(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizer_gemma4.model")


def output_of(message: dict, thinking: bool = True) -> str:
    """What a model writes that answers with `message`."""
    spans = chat.render_spans([USER, message], enable_thinking=thinking, as_generated=True, empty_thought=False)
    return "".join(span.text for span in spans if span.trained)


def random_text(rng: random.Random, size: int = 40) -> str:
    """Trimmed, and free of special strings."""
    return "x" + "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(size))).replace("|", "/") + "."


def message_of(calls: list[dict], rng: random.Random, answer: str | None = None) -> tuple[dict, Parsed]:
    """An assistant message and how its output must parse."""
    thought = random_text(rng) if rng.random() < 0.7 else ""
    answer = answer if answer is not None else "" if calls else random_text(rng)
    message = {
        "role": "assistant",
        "content": answer,
        "reasoning": thought,
        "tool_calls": [{"function": call} for call in calls],
    }
    return message, Parsed(thought, calls, answer, stopped=True)


def own_calls() -> list[list[dict]]:
    """The tool calls of the embedded conversations."""
    found = []
    for line in assets.TRAIN.read_text().splitlines():
        messages = json.loads(line)["messages"]
        calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
        found += [[{key: call[key] for key in ("name", "arguments")} for call in calls]] if calls else []
    return found


def bfcl_calls(shared_data) -> list[list[dict]]:
    """The expected calls of BFCL: the first of the accepted values of every argument."""
    found = []
    for name in ("multiple", "parallel", "simple_python"):
        for line in (shared_data / f"bfcl_{name}.answers.jsonl").read_text().splitlines():
            calls = [item for truth in json.loads(line)["ground_truth"] for item in truth.items()]
            found.append([{"name": f, "arguments": {k: v[0] for k, v in a.items() if v[0] != ""}} for f, a in calls])
    return found


def transcripts(tokenizer: Tokenizer, calls: list[list[dict]]) -> list[tuple[list[int], Parsed | None]]:
    """(ids, parse): 25 conversations with calls, 15 of random text, 10 cut off or malformed (parse None: not known)."""
    rng = random.Random(5)
    made = []
    for number in range(40):
        some = rng.choice(calls) if number < 25 else []
        if number % 5 == 4:
            some = [*some, {"name": "f", "arguments": {"k": random_text(rng), "list": [1, None, random_text(rng)]}}]
        message, parsed = message_of(some, rng)
        made.append((tokenizer.encode(output_of(message)), parsed))
    for number in range(10):
        ids = list(made[rng.randrange(40)][0])
        if number < 5:
            ids = ids[: rng.randrange(len(ids))]
        else:  # any special token anywhere, and bytes that are no character
            for _ in range(4):
                noise = [
                    *tokenizer.stop_ids,
                    tokenizer.special.quote,
                    tokenizer.special.channel_open,
                    *byte_ids(tokenizer),
                ]
                ids.insert(rng.randrange(len(ids)), rng.choice(noise))
        made.append((ids, None))
    return made


def run(tokenizer: Tokenizer, portions: list[list[int]]) -> Parsed:
    """The parse of a stream, after checking that its events say the same."""
    parser = StreamParser(tokenizer)
    events = [event for portion in portions for event in parser.feed(portion)] + parser.finish()
    text = {kind: "".join(event.text for event in events if event.kind == kind) for kind in ("thought", "answer")}
    said = Parsed(
        text["thought"],
        [event.call for event in events if event.kind == "tool_call" and event.call is not None],
        text["answer"],
        [event.text for event in events if event.kind == "malformed"],
        any(event.kind == "stop" for event in events),
    )
    assert said == parser.result()
    return said


def check_all_splits(tokenizer: Tokenizer, calls: list[list[dict]]) -> int:
    made = transcripts(tokenizer, calls)
    assert len(made) == 50
    rng = random.Random(6)
    splits = 0
    for ids, wanted in made:
        whole = parse(ids, tokenizer)
        assert wanted is None or whole == wanted
        ways = [[ids[:cut], ids[cut:]] for cut in range(len(ids) + 1)] + [[[index] for index in ids]]
        for _ in range(10):
            cuts = sorted(rng.randrange(len(ids) + 1) for _ in range(rng.randrange(2, 8)))
            ways.append([ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)])
        for portions in ways:
            assert run(tokenizer, portions) == whole
        splits += len(ways)
    return splits


def test_every_split_of_50_transcripts(tokenizer):
    assert check_all_splits(tokenizer, own_calls()) > 4000


def test_every_split_of_50_bfcl_transcripts(published, shared_data):
    assert check_all_splits(published, bfcl_calls(shared_data)) > 2000


def test_text_is_that_of_sentencepiece(tokenizer):
    """Any bytes, characters or not, in any portions."""
    rng = random.Random(7)
    byte_of = {byte: index for index, byte in byte_ids(tokenizer).items()}
    assert len(byte_of) == 256
    likely = [*"€🙂é\u07ff".encode(), 0xED, 0xA0, 0xF4, 0x90, 0xC0, 0xFF, 0x41]
    for _ in range(400):
        ids = [byte_of[rng.choice(likely)] if rng.random() < 0.8 else 800 for _ in range(rng.randrange(1, 12))]
        decoder = TextDecoder(tokenizer)
        pieces = [decoder.feed([index]) for index in ids] + [decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_pieces_end_between_characters(tokenizer):
    text = "é🙂한"
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.feed([index]) for index in tokenizer.encode(text)]
    assert len(pieces) > len(text)  # byte pieces
    assert [piece for piece in pieces if piece] == list(text)


def test_text_comes_at_once(tokenizer):
    """Nothing is held back but white space, a channel's name and the bytes of a character."""
    parser = StreamParser(tokenizer)
    shown = ""
    for index in tokenizer.encode("One two  three."):
        shown += "".join(event.text for event in parser.feed([index]))
        assert shown == parser.result().answer
    assert shown == "One two  three."
    parser = StreamParser(tokenizer)
    assert parser.feed(tokenizer.encode("<|channel>thou")) == []
    assert [event.text for event in parser.feed(tokenizer.encode("ght\nHm"))] == ["Hm"]
    parser = StreamParser(tokenizer)
    assert [event.text for event in parser.feed(tokenizer.encode("<|channel>though I"))] == ["though I"]


def test_two_thoughts_and_the_call_between(tokenizer):
    text = "<|channel>thought\nA\n<channel|><|tool_call>call:f{}<tool_call|><|channel>thought\n\n<channel|>"
    text += "<|channel>thought\nB<channel|> done <turn|>more"
    parsed = run(tokenizer, [[index] for index in tokenizer.encode(text)])
    assert parsed == Parsed("A\n\nB", [{"name": "f", "arguments": {}}], "done", stopped=True)


def test_processor_parses_streams(tokenizer):
    processor = Processor(tokenizer)
    parser = processor.stream_parser()
    parser.feed(tokenizer.encode("yes<turn|>"))
    assert parser.result() == processor.parse(tokenizer.encode("yes<turn|>")) == Parsed("", [], "yes", stopped=True)

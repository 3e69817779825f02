"""Tokens are those of the rendered string, and the mask covers exactly what the model writes."""

import json

import numpy as np
import pytest

from gemma4_jax import assets, chat
from gemma4_jax.chat_check import ChatError
from gemma4_jax.errors import UserError
from gemma4_jax.processor import Processor

CHAT = [{"role": "user", "content": "Count: a b"}, {"role": "assistant", "content": "2, I think. 🙂"}]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(assets.TOKENIZER)


@pytest.fixture(scope="module")
def published(shared_data) -> Processor:
    return Processor.load(shared_data / "tokenizer_gemma4.model")


def rows(path, count=None):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def test_golden_tokens_and_masks(published, shared_data):
    tokenizer = published.tokenizer
    for row in rows(shared_data / "chat_template_golden.jsonl"):
        spans = chat.render_spans(row["messages"], **row["kwargs"])
        tokens, mask = published.encode_spans(spans)
        assert tokens.tolist() == tokenizer.encode(row["rendered"])
        assert tokens.tolist() == [index for span in spans for index in tokenizer.encode(span.text)]
        assert tokenizer.decode(tokens[mask]) == "".join(span.text for span in spans if span.trained)
        assert np.count_nonzero(tokens == 2) == 1


def test_trained_text_is_the_answer_and_its_stop(processor):
    for row in rows(assets.HELDOUT):
        example = processor.encode(row["messages"], row.get("tools"))
        wanted = ""
        for message in row["messages"]:
            if message["role"] == "assistant":
                turn = chat.render([row["messages"][0], message], as_generated=False).split("<|turn>model\n")[1]
                wanted += turn.removesuffix("\n")
        assert processor.decode(example.tokens[example.loss_mask]) == wanted
        assert wanted.endswith(("<turn|>", "<|tool_response>"))


def test_arrays(processor):
    example = processor.encode(CHAT)
    assert example.tokens.dtype == example.positions.dtype == np.int32
    assert example.loss_mask.dtype == bool
    assert example.positions.tolist() == list(range(len(example.tokens)))
    assert example.tokens[0] == processor.tokenizer.special.bos
    assert example.media is None
    assert processor.decode(example.tokens[example.loss_mask]) == "2, I think. 🙂<turn|>"


@pytest.mark.parametrize("empty_thought", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_prompt_is_a_prefix(empty_thought, thinking):
    processor = Processor.load(assets.TOKENIZER, empty_thought=empty_thought)
    prompt = processor.encode(CHAT[:1], enable_thinking=thinking, add_generation_prompt=True)
    whole = processor.encode(CHAT, enable_thinking=thinking)
    length = len(prompt.tokens)
    assert whole.tokens[:length].tolist() == prompt.tokens.tolist()
    assert not whole.loss_mask[:length].any()
    assert not prompt.loss_mask.any()
    rendered = processor.render(CHAT[:1], enable_thinking=thinking, add_generation_prompt=True)
    assert processor.decode(prompt.tokens) == rendered
    assert rendered.endswith(chat.EMPTY_THOUGHT) == (empty_thought and not thinking)


def test_a_border_inside_a_piece(processor):
    """The mask follows characters where a piece spans trained and untrained text."""
    merged = next(
        piece
        for index in range(400, 1024)
        if len(piece := processor.tokenizer.piece_of(index)) == 2 and piece.isalpha()
    )
    spans = [
        chat.Span(f"<bos>{merged[0]}", "user"),
        chat.Span(merged[1], "assistant", True),
        chat.Span("<turn|>", "stop"),
    ]
    tokens, mask = processor.encode_spans(spans)
    assert tokens.tolist() == processor.tokenizer.encode(f"<bos>{merged}<turn|>")
    assert mask.tolist() == [False, True, False]


def test_train_on_last(processor):
    example = processor.encode([*CHAT, *CHAT], train_on="last")
    assert processor.decode(example.tokens[example.loss_mask]) == "2, I think. 🙂<turn|>"
    assert np.count_nonzero(processor.encode([*CHAT, *CHAT]).loss_mask) == 2 * np.count_nonzero(example.loss_mask)


def test_text(processor):
    example = processor.encode_text("one two")
    assert processor.decode(example.tokens) == "<bos>one two<eos>"
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    bare = processor.encode_text("one two", add_bos=False, add_eos=False)
    assert bare.loss_mask.all()
    assert processor.decode(bare.tokens) == "one two"


def test_parse(processor):
    example = processor.encode(CHAT)
    assert processor.parse(example.tokens[example.loss_mask]).answer == "2, I think. 🙂"


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        (CHAT[:1], "no assistant turn", "no assistant message"),
        ([{"role": "user", "content": "<bos>"}, CHAT[1]], "<bos> inside the text", "only at the start"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]],
            "media without a source",
            r"messages\[0\].content\[0\] wants exactly one of path, bytes, array, image",
        ),
    ],
)
def test_refused(processor, messages, reason, message):
    with pytest.raises(ChatError, match=message) as caught:
        processor.encode(messages)
    assert caught.value.reason == reason


def test_placeholders_render(processor):
    parts = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "audio"}, {"type": "video"}]
    assert "<|image|>and<|audio|><|video|><turn|>" in processor.render([{"role": "user", "content": parts}])


def test_chat_needs_chat_pieces(tmp_path):
    from test_tokenizer import train_tiny

    plain = Processor.load(train_tiny(tmp_path / "tiny.model"))
    assert plain.decode(plain.encode_text("a b").tokens[1:-1]).strip() == "a b"
    with pytest.raises(UserError, match="The chat format needs the special pieces"):
        plain.encode(CHAT)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, True),
        ({"config.json": '{"text_config": {"hidden_size_per_layer_input": 256}}'}, False),
        ({"config.json": '{"hidden_size_per_layer_input": 0}'}, True),
        ({"config.json": '{"text_config": {}}', "chat_template.jinja": "{{ '<|turn>model\\n' }}"}, False),
        ({"chat_template.jinja": "{{ '<|channel>thought\\n<channel|>' }}"}, True),
    ],
)
def test_a_checkpoint_says_how_its_prompts_end(processor, tmp_path, files, wanted):
    processor.save(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert Processor.load(tmp_path).empty_thought is wanted
    assert Processor.load(tmp_path, empty_thought=not wanted).empty_thought is not wanted

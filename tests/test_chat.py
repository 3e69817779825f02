"""Rendering equals the published template, spans say what the model writes itself, and parsing undoes rendering."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax import assets, chat
from gemma4_jax.chat_check import ChatError
from gemma4_jax.chat_parse import Parsed, parse
from gemma4_jax.tokenizer import Tokenizer

USER = {"role": "user", "content": "Weather?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "Ask the tool."}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
ANSWER = {"role": "assistant", "content": "It rains."}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {"type": "object"}}}
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.TOKENIZER)


@pytest.fixture(scope="module")
def golden(shared_data) -> list[dict]:
    rows = [json.loads(line) for line in (shared_data / "chat_template_golden.jsonl").read_text().splitlines()]
    assert len(rows) == 198
    return rows


def trained(spans):
    return "".join(span.text for span in spans if span.trained)


def test_published_template(golden):
    wrong = [row["kind"] for row in golden if chat.render(row["messages"], **row["kwargs"]) != row["rendered"]]
    assert not wrong


def test_published_calls_parse_back(golden, tokenizer):
    calls = 0
    for row in golden:
        for message in row["messages"]:
            if not message.get("tool_calls"):
                continue
            wanted = [{key: call["function"][key] for key in ("name", "arguments")} for call in message["tool_calls"]]
            text = chat.render([USER, message]).split("<|turn>model\n")[1]
            parsed = parse(tokenizer.encode(text), tokenizer)
            assert parsed.tool_calls == parse(text).tool_calls == wanted
            assert parsed.thought == message.get("reasoning", "")
            assert parsed.stopped
            assert not parsed.malformed
            calls += len(wanted)
    assert calls > 100


def test_whole_tool_turn():
    """One model turn: thought, call, the stop token the model writes, the result it is given, answer, stop."""
    spans = chat.render_spans([USER, CALLING, RESULT, ANSWER], TOOLS)
    assert [(span.text, span.role, span.trained) for span in spans[3:]] == [
        ("Weather?", "user", False),
        ("<turn|>", "turn", False),
        ("\n", "turn", False),
        ("<|turn>model\n", "turn", False),
        ("<|channel>thought\nAsk the tool.\n<channel|>", "thought", True),
        ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>', "tool_call", True),
        ("<|tool_response>", "stop", True),
        ('response:weather{value:<|"|>rain<|"|>}<tool_response|>', "tool_response", False),
        ("It rains.", "assistant", True),
        ("<turn|>", "stop", True),
        ("\n", "turn", False),
    ]
    assert spans[0].text == "<bos>"
    assert spans[1].role == "system"


def test_result_layouts_agree():
    embedded = {**CALLING, "tool_responses": [{"name": "weather", "response": "rain"}]}
    as_message = chat.render_spans([USER, CALLING, RESULT, ANSWER])
    inside = chat.render_spans([USER, embedded, ANSWER])
    assert [(span.text, span.trained) for span in inside] == [(span.text, span.trained) for span in as_message]
    structured = {**RESULT, "content": {"sky": "rain", "Degrees": [1, 2.5]}}
    assert 'response:weather{Degrees:[1,2.5],sky:<|"|>rain<|"|>}' in chat.render([USER, CALLING, structured])


def test_second_result_is_given_not_written():
    other = {**CALL, "id": "c2"}
    calling = {"role": "assistant", "tool_calls": [CALL, other]}
    spans = chat.render_spans([USER, calling, RESULT, {**RESULT, "tool_call_id": "c2"}, ANSWER])
    markers = [span.trained for span in spans if span.text == "<|tool_response>"]
    assert markers == [True, False]


def test_unanswered_call_ends_with_its_stop_token():
    spans = chat.render_spans([USER, CALLING], add_generation_prompt=True)
    assert (spans[-1].text, spans[-1].trained) == ("<|tool_response>", True)


def test_train_on_last_turn():
    messages = [USER, ANSWER, USER, CALLING, RESULT, ANSWER]
    every = trained(chat.render_spans(messages))
    last = trained(chat.render_spans(messages, train_on="last"))
    assert every == "It rains.<turn|>" + last
    assert last.startswith("<|channel>thought\nAsk the tool.")
    assert last.endswith("It rains.<turn|>")
    assert trained(chat.render_spans([USER, ANSWER, USER], train_on="last")) == "It rains.<turn|>"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("empty_thought", [False, True])
def test_training_text_begins_with_its_prompt(thinking, empty_thought):
    """What is trained follows exactly what the model is given when it generates."""
    answer = {**ANSWER, "reasoning": "Look out."} if thinking else ANSWER
    options = {"enable_thinking": thinking, "empty_thought": empty_thought}
    for history in ([USER], [USER, ANSWER, USER], [{"role": "system", "content": "Be brief."}, USER]):
        prompt = chat.render(history, TOOLS, add_generation_prompt=True, **options)
        spans = chat.render_spans([*history, answer], TOOLS, as_generated=True, train_on="last", **options)
        given = "".join(span.text for span in spans if not span.trained)
        assert given == prompt + "\n"
        thought = "<|channel>thought\nLook out.\n<channel|>" if thinking else ""
        assert trained(spans) == f"{thought}It rains.<turn|>"


def test_empty_thought_stands_only_before_a_turn_without_one():
    assert chat.EMPTY_THOUGHT not in chat.render([USER, CALLING, RESULT, ANSWER], as_generated=True)
    plain = {key: value for key, value in CALLING.items() if key != "reasoning"}
    text = chat.render([USER, ANSWER, USER, plain, RESULT, ANSWER], as_generated=True)
    assert text.count(chat.EMPTY_THOUGHT) == 1
    assert "<|turn>model\n<|channel>thought\n<channel|><|tool_call>" in text


def test_schema_notation():
    schema = {
        "type": "object",
        "properties": {
            "b": {"type": "string", "enum": ["x", "y"], "nullable": True, "description": "B"},
            "A": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            "c": {
                "type": "array",
                "items": {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"]},
            },
            "d": {"type": "object", "x": {"type": "boolean"}},
        },
        "required": ["b"],
    }
    tool = {"function": {"name": "f", "description": "F", "parameters": schema, "response": {"type": "object"}}}
    text = chat.render([USER], [tool]).replace('<|"|>', "'")
    assert text.startswith("<bos><|turn>system\n<|tool>declaration:f{description:'F',parameters:{properties:{A:{")
    assert "A:{properties:{n:{type:'INTEGER'}},required:['n'],type:'OBJECT'}" in text
    assert "b:{description:'B',enum:['x','y'],nullable:true,type:'STRING'}" in text
    assert "c:{items:{properties:{k:{type:'NUMBER'}},required:['k'],type:'OBJECT'},type:'ARRAY'}" in text
    assert "d:{properties:{x:{type:'BOOLEAN'}},type:'OBJECT'}" in text
    assert text.split("<turn|>")[0].endswith("required:['b'],type:'OBJECT'},response:{type:'OBJECT'}}<tool|>")


BAD = [
    ("hello", "messages is not a list", "must be a list of messages, got str"),
    ([], "no messages", "at least one message"),
    (["hi"], "message is not an object", r"messages\[0\] must be an object"),
    ([{"role": "asistant", "content": "x"}], "unknown role", r"messages\[0\].*'asistant'.*did you mean 'assistant'\?"),
    ([{"role": "model", "content": "x"}], "unknown role", r"did you mean 'assistant'\?"),
    ([{"content": "x"}], "unknown role", "unknown role None"),
    ([{"role": "user"}], "missing content", r"messages\[0\] \(user\) has no content"),
    ([{"role": "user", "content": 3}], "content is not text", "got int"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "unknown content part", r"did you mean 'image'\?"),
    ([{"role": "user", "content": [{"type": "text"}]}], "missing content", r"content\[0\] is a text part without"),
    ([{"role": "system", "content": [{"type": "image"}]}, USER], "media in the system turn", "takes text, got image"),
    ([USER, {"role": "assistant", "content": None}], "missing content", r"messages\[1\] \(assistant\)"),
    ([USER, {**ANSWER, "reasoning": 1}], "reasoning is not text", "got int"),
    ([USER, RESULT], "tool result without a call", r"messages\[1\] is a tool result"),
    ([USER, CALLING, RESULT, ANSWER, RESULT], "tool result without a call", r"messages\[4\]"),
    ([{**USER, "tool_calls": [CALL]}], "tool_calls outside assistant", "not 'assistant'"),
    ([USER, {**CALLING, "tool_calls": "x"}], "tool_calls is not a list", "got str"),
    ([USER, {**CALLING, "tool_calls": [{}]}], "malformed tool call", r"tool_calls\[0\] must be"),
    (
        [USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}],
        "tool arguments are not an object",
        "got str; decode the JSON string first",
    ),
    ([USER, {**ANSWER, "tool_responses": [{}]}], "malformed tool response", "response"),
]


@pytest.mark.parametrize(("messages", "reason", "message"), BAD, ids=[f"{n}-{case[1]}" for n, case in enumerate(BAD)])
def test_bad_messages(messages, reason, message):
    with pytest.raises(ChatError, match=message) as caught:
        chat.render(messages)
    assert caught.value.reason == reason


@pytest.mark.parametrize("tools", ["weather", [{}], [{"function": {"name": "f", "parameters": {"properties": []}}}]])
def test_bad_tools(tools):
    with pytest.raises(ChatError, match="tools"):
        chat.render([USER], tools)


def test_parse_separates(tokenizer):
    text = (
        "<|channel>thought\nFirst.\n\nThen.\n<channel|>Let me see. "
        '<|tool_call>call:a.b{x:[1,-2.5,1e3],y:{z:true,w:None},s:<|"|>{a:1},[<|"|>,e:<|"|><|"|>,u:word}<tool_call|>'
        "<|tool_call>call:none{}<tool_call|><|tool_response>never read"
    )
    wanted = Parsed(
        thought="First.\n\nThen.",
        tool_calls=[
            {
                "name": "a.b",
                "arguments": {
                    "x": [1, -2.5, 1000.0],
                    "y": {"z": True, "w": None},
                    "s": "{a:1},[",
                    "e": "",
                    "u": "word",
                },
            },
            {"name": "none", "arguments": {}},
        ],
        answer="Let me see.",
        stopped=True,
    )
    assert parse(text) == parse(tokenizer.encode(text), tokenizer) == wanted


def test_parse_reads_ids_not_text(tokenizer):
    """Ordinary pieces that spell a marker are text."""
    spelt = [index for character in "<turn|>" for index in tokenizer.encode(character)]
    parsed = parse([*tokenizer.encode("a "), *spelt, *tokenizer.encode(" b")], tokenizer)
    assert parsed.answer == "a <turn|> b"
    assert not parsed.stopped


@pytest.mark.parametrize(
    "call",
    [
        "call:f{a:1",
        "f{a:1}",
        "call:f",
        "call:f{a 1}",
        "call:f{a:1,}x",
        "call:f{a:[1}",
        'call:f{a:<|"|>x}',
        "call:f{a:1}}",
        "",
    ],
)
def test_malformed_calls_are_kept_apart(call):
    parsed = parse(f"ok<|tool_call>{call}<tool_call|>")
    assert parsed.tool_calls == []
    assert parsed.malformed == [call]
    assert parsed.answer == "ok"


def test_output_cut_anywhere(tokenizer):
    text = chat.render([USER, CALLING, RESULT, ANSWER]).split("<|turn>model\n")[1].split("response:")[0]
    ids = tokenizer.encode(text)
    for stop in range(len(ids)):
        parsed = parse(ids[:stop], tokenizer)
        assert "Ask the tool.".startswith(parsed.thought)
        assert not parsed.stopped
        assert parsed.answer == ""
    whole = parse(ids, tokenizer)
    assert whole.tool_calls == [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]
    assert whole.stopped


TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: "<" not in text)
KEY = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
NUMBER = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(KEY, VALUE, max_size=4))
def test_any_arguments_parse_back(arguments):
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    parsed = parse(chat.render([USER, calling]).split("<|turn>model\n")[1])
    assert parsed.tool_calls == [{"name": "f", "arguments": arguments}]

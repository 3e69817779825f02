"""Whatever a random writer makes under a schema validates, as JSON and as the arguments of a tool call.

The writer draws from the allowed tokens with no model behind it, and is pressed to come to an end: an independent library
(`jsonschema`) judges what it wrote.
"""

import copy
import json
import random
import re
import sys
from typing import Literal

import numpy as np
import pytest

from gemma4_jax import assets, chat_parse, chat_syntax
from gemma4_jax.errors import UserError
from gemma4_jax.infer.call_grammar import call_grammar
from gemma4_jax.infer.constraint import AllOf, Constraint
from gemma4_jax.infer.output_form import OutputForm
from gemma4_jax.infer.tools import tool_of
from gemma4_jax.infer.vocabulary import Vocabulary, ids_of
from gemma4_jax.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="structured output is the extra [structured]")
jsonschema = pytest.importorskip("jsonschema", reason="the judge of structured output, in the extra [dev]")

from gemma4_jax.infer.structured import Grammars  # noqa: E402

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.TOKENIZER)


@pytest.fixture(scope="module")
def published(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizer_gemma4.model")


class Writer:
    """Draws allowed tokens at random; past `calm` tokens, or now and then, only those that lead to an end."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self.vocabulary = vocabulary
        self.rng = random.Random(seed)
        special = vocabulary.tokenizer.special
        closing = [i for i, text in enumerate(vocabulary.texts) if not text.strip(b'"}]')]
        closing += [i for i in (special.quote, special.tool_call_close, special.channel_close) if i is not None]
        self.closing = [vocabulary.mask(vocabulary.stop_ids), vocabulary.mask(closing)]
        blank = [i for i, text in enumerate(vocabulary.texts) if not text.strip()]
        self.closing += [vocabulary.everything & ~vocabulary.mask(blank), vocabulary.everything]

    def write(self, constraint: Constraint, calm: int = 40, most: int = 1500) -> list[int]:
        """The ids, the stop id left out."""
        ids: list[int] = []
        while not constraint.finished:
            mask = constraint.mask()
            assert mask.dtype == np.uint32
            if len(ids) > calm or self.rng.random() < 0.15:
                mask = next(some for closing in self.closing if (some := mask & closing).any())
            token = int(self.rng.choice(ids_of(mask)))
            constraint.advance(token)
            if token in self.vocabulary.stop_ids:
                break
            ids.append(token)
            assert len(ids) < most, self.vocabulary.tokenizer.decode(ids[-200:])
        assert not constraint.failed
        return ids


def normal(schema):
    """BFCL's schema as JSON Schema: its names for types are Python's."""
    if isinstance(schema, list):
        return [normal(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: normal(inner) for key, inner in schema.items() if key not in ("optional", "default")}
    if isinstance(made.get("type"), str):
        made["type"] = JSON_TYPES.get(made["type"], made["type"])
        if made["type"] == "any":
            del made["type"]
    return made


def bfcl_schemas(shared_data) -> list[dict]:
    found = {}
    for name in ("multiple", "parallel", "simple_python"):
        for line in (shared_data / f"bfcl_{name}.jsonl").read_text().splitlines():
            for function in json.loads(line)["function"]:
                schema = normal(function["parameters"])
                found[json.dumps(schema, sort_keys=True)] = schema
    return list(found.values())


def own_schemas() -> list[dict]:
    """The tools of the embedded conversations."""
    rows = [json.loads(line) for line in assets.TRAIN.read_text().splitlines()]
    tools = [tool["function"]["parameters"] for row in rows for tool in row.get("tools") or ()]
    return list({json.dumps(schema, sort_keys=True): schema for schema in tools}.values())


def varied(schema: dict, rng: random.Random, depth: int = 0) -> dict:
    """A schema with limits, alternatives and nesting put in at random."""
    schema = copy.deepcopy(schema)
    kind = schema.get("type")
    if kind == "object":
        schema["properties"] = {k: varied(v, rng, depth + 1) for k, v in (schema.get("properties") or {}).items()}
        schema["required"] = [name for name in schema["properties"] if rng.random() < 0.6]
        if rng.random() < 0.5:
            schema["additionalProperties"] = False
        if depth == 0 and rng.random() < 0.3:
            inner = {"type": "array", "items": copy.deepcopy(schema), "minItems": 1, "maxItems": 2}
            schema = {"type": "object", "properties": {"rows of it": inner}, "required": ["rows of it"]}
    elif "enum" in schema:
        return schema
    elif kind == "array":
        schema["items"] = varied(schema.get("items", {"type": "string"}), rng, depth + 1)
        schema["minItems"] = rng.randrange(3)
        if rng.random() < 0.5:
            schema["maxItems"] = schema["minItems"] + rng.randrange(3)
    elif kind in ("integer", "number") and rng.random() < 0.5:
        low = rng.randrange(-50, 50)
        schema |= {"minimum": low, "maximum": low + rng.randrange(1000)}
    elif kind == "string":
        least = rng.randrange(4)
        extra = [{}, {"minLength": least}, {"minLength": least, "maxLength": least + 5}, {"pattern": "^[A-Z]{2}-\\d+$"}]
        schema |= rng.choice(extra)
    if depth and rng.random() < 0.1:
        notes = {"description": schema.pop("description", "")}
        return {"anyOf": [schema, {"type": "null"}], **notes}
    return schema


def check(tokenizer: Tokenizer, schemas: list[dict], count: int, seed: int) -> int:
    """Writes JSON and a tool call under `count` varied schemas; returns how many tokens that took."""
    rng = random.Random(seed)
    grammars = Grammars.of(tokenizer)
    writer = Writer(grammars.vocabulary, seed)
    tokens = 0
    for number in range(count):
        schema = varied(rng.choice(schemas), rng)
        jsonschema.Draft202012Validator.check_schema(schema)
        ids = writer.write(grammars.schema(schema).constraint())
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
        tool = {"type": "function", "function": {"name": f"tool.n_{number}", "parameters": schema}}
        grammar = grammars.lark(call_grammar([tool], tokenizer))
        call = writer.write(grammar.constraint())
        parsed = chat_parse.parse([tokenizer.special.tool_call_open or 0, *call], tokenizer)
        assert not parsed.malformed, parsed.malformed
        (said,) = parsed.tool_calls
        assert said["name"] == f"tool.n_{number}"
        jsonschema.validate(said["arguments"], schema)
        tokens += len(ids) + len(call)
    return tokens


def test_all_output_validates(tokenizer):
    assert check(tokenizer, own_schemas(), count=20, seed=1) > 400


@pytest.mark.slow
def test_all_output_validates_under_200_bfcl_schemas(published, shared_data):
    schemas = bfcl_schemas(shared_data)
    assert len(schemas) > 800
    assert check(published, schemas, count=200, seed=2) > 4000


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PAIR = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def outputs(tokenizer, form: OutputForm, count=12, **prompt) -> list[chat_parse.Parsed]:
    """Parsed outputs of random writers under a form, each checked to hold no stray marker."""
    found = []
    for seed in range(count):
        constraint = form.constraint(tokenizer, **prompt)
        assert constraint is not None
        found.append(
            chat_parse.parse(Writer(Vocabulary.of(tokenizer), seed).write(constraint, calm=6 + seed), tokenizer)
        )
        assert not found[-1].malformed
    return found


def allowed(constraint: Constraint) -> set[int]:
    return set(ids_of(constraint.mask()).tolist())


def test_masks_are_bits_of_tokens(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    mask = vocabulary.mask([0, 31, 32, 895, None])
    assert mask.dtype == np.uint32
    assert mask.shape == (28,)
    assert (mask[0], mask[1], mask[27]) == (1 + 2**31, 1, 2**31)
    assert ids_of(mask).tolist() == [0, 31, 32, 895]
    assert ids_of(vocabulary.text | vocabulary.mask(vocabulary.special)).tolist() == list(range(896))
    assert tokenizer.special.turn_close not in ids_of(vocabulary.text)
    assert tokenizer.special.newline in ids_of(vocabulary.text)


def test_regex_and_lark(tokenizer):
    for parsed in outputs(tokenizer, OutputForm(regex=r"^\d{3}-(yes|no)$")):
        assert re.fullmatch(r"\d{3}-(yes|no)", parsed.answer)
    answers = {one.answer for one in outputs(tokenizer, OutputForm(grammar='start: "a"+ tail\ntail: "b" | "c"'))}
    assert all(re.fullmatch("a+[bc]", answer) for answer in answers)
    assert len(answers) > 3


def test_end_is_allowed_where_the_grammar_is_complete(tokenizer):
    """The request's own stop ids, not the tokenizer's, and only there."""
    constraint = Grammars.of(tokenizer).regex(r"\d{2,}").constraint([106, 60])
    first, second = tokenizer.encode("12")
    for token in (first, second):
        assert not allowed(constraint) & {1, 50, 60, 106}
        constraint.advance(token)
    assert allowed(constraint) & {1, 50, 60, 106} == {60, 106}
    assert not constraint.finished
    constraint.advance(60)
    assert constraint.finished
    assert not constraint.failed
    whole = Grammars.of(tokenizer).regex("ab").constraint(())
    for token in tokenizer.encode("ab"):
        whole.advance(token)
    assert whole.finished  # also when no stop id could say so
    assert whole.mask().any()


def test_a_wrong_token_fails_its_own_output_only(tokenizer):
    grammar = Grammars.of(tokenizer).schema(PAIR)
    wrong, right = grammar.constraint(), grammar.constraint()
    wrong.advance(tokenizer.encode("x")[0])
    assert wrong.finished
    assert "The JSON schema could not be kept up" in wrong.failed
    assert "\n" not in wrong.failed
    assert allowed(wrong) == set(tokenizer.stop_ids)
    assert not right.finished
    broken_off = grammar.constraint()
    broken_off.advance(106)
    assert "broken off" in broken_off.failed


def test_tool_choice(tokenizer):
    some = [one.tool_calls for one in outputs(tokenizer, OutputForm(tool_choice="required"), 30, tools=TOOLS)]
    assert all(calls for calls in some)
    assert {call["name"] for calls in some for call in calls} == {"weather", "now"}
    assert max(len(calls) for calls in some) > 1
    for choice in ("weather", {"type": "function", "function": {"name": "weather"}}):
        form = OutputForm(tool_choice=choice, parallel_tool_calls=False)
        for parsed in outputs(tokenizer, form, tools=TOOLS):
            (call,) = parsed.tool_calls
            assert call["name"] == "weather"
            assert parsed.answer == parsed.thought == ""
            jsonschema.validate(call["arguments"], TOOLS[0]["function"]["parameters"])
    for call in (call for calls in some for call in calls if call["name"] == "now"):
        assert call["arguments"] == {}
    none = OutputForm(tool_choice="none").constraint(tokenizer, tools=TOOLS)
    assert none is not None
    assert set(range(896)) - allowed(none) == {tokenizer.special.tool_call_open}
    assert OutputForm().constraint(tokenizer, tools=TOOLS) is None


def test_required_calls_end_as_the_chat_format_has_it(tokenizer):
    constraint = OutputForm(tool_choice="now").constraint(tokenizer, tools=TOOLS)
    assert constraint is not None
    for token in tokenizer.encode("<|tool_call>call:now{}<tool_call|>"):
        assert token in allowed(constraint)
        constraint.advance(token)
    special = tokenizer.special
    assert allowed(constraint) == {special.tool_call_open, special.tool_response_open}
    constraint.advance(special.tool_response_open or 0)
    assert constraint.finished


def test_answers_do_not_end_as_calls_do(tokenizer):
    constraint = OutputForm(regex="a+").constraint(tokenizer)
    assert constraint is not None
    constraint.advance(tokenizer.encode("a")[0])
    assert allowed(constraint) & set(tokenizer.stop_ids) == {1, 106}


def test_auto_holds_calls_to_their_schemas_and_leaves_text_alone(tokenizer):
    constraint = OutputForm(strict_tools=True).constraint(tokenizer, tools=TOOLS)
    assert constraint is not None
    for token in tokenizer.encode("Let me see. <|tool_call>"):
        assert len(allowed(constraint)) == 896
        constraint.advance(token)
    text = 'call:weather{city:<|"|>Oslo'
    for token in tokenizer.encode(text):
        assert token in allowed(constraint)
        constraint.advance(token)
    assert tokenizer.special.tool_call_close not in allowed(constraint)
    for token in tokenizer.encode('<|"|>}<tool_call|>'):
        constraint.advance(token)
    assert len(allowed(constraint)) == 896
    assert not constraint.finished


def test_thought_then_form(tokenizer):
    """A thought may come first, within its budget; what follows it obeys the form."""
    forms = {
        "schema": OutputForm(schema=PAIR, thinking_budget=5),
        "calls": OutputForm(tool_choice="required", thinking_budget=5),
        "either": OutputForm(schema=PAIR, thinking_budget=5),
    }
    for name, form in forms.items():
        vocabulary = Vocabulary.of(tokenizer)
        thought = [tokenizer.special.channel_open or 0, *tokenizer.encode("thought\nHm")]
        for seed in range(12):
            constraint = form.constraint(tokenizer, tools=None if name == "schema" else TOOLS, thinking=True)
            assert constraint is not None
            begun = thought if seed % 2 else []
            for token in begun:
                assert token in allowed(constraint)
                assert not begun.index(token) or not allowed(constraint) & set(tokenizer.stop_ids)
                constraint.advance(token)
            ids = begun + Writer(vocabulary, seed).write(constraint)
            if begun:
                assert ids.index(tokenizer.special.channel_close) <= 6
            parsed = chat_parse.parse(ids, tokenizer)
            assert not parsed.malformed
            assert bool(parsed.tool_calls) == (name == "calls") or name == "either"
            if not parsed.tool_calls:
                jsonschema.validate(json.loads(parsed.answer), PAIR)
            assert not (parsed.tool_calls and parsed.answer)


def test_thought_budget(tokenizer):
    special = tokenizer.special
    budget = OutputForm(thinking_budget=3).constraint(tokenizer, thinking=True)
    assert budget is not None
    for token in (special.channel_open, 700, 701):
        assert len(allowed(budget)) == 896
        budget.advance(token or 0)
    budget.advance(702)
    assert allowed(budget) == {special.channel_close}
    budget.advance(special.channel_close or 0)
    assert set(range(896)) - allowed(budget) == {special.channel_open}
    none = OutputForm(thinking_budget=0).constraint(tokenizer)
    assert none is not None
    assert special.channel_open not in allowed(none)


def test_parts_that_exclude_each_other_end_the_output(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    parts = [Grammars.of(tokenizer).regex("a").constraint(), Grammars.of(tokenizer).regex("b").constraint()]
    both = AllOf(parts, vocabulary, (106,))
    assert allowed(both) == {106}
    assert both.finished
    assert "leave no token" in both.failed


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
ENDLESS_REF = {"anyOf": [{"$ref": "#/$defs/b"}, {"allOf": [{"$ref": "#/$defs/b"}]}]}
BAD_FORMS = [
    ({"schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "JSON schema cannot be satisfied: minimum"),
    ({"schema": False}, "cannot be satisfied"),
    ({"schema": {"$ref": "#"}}, "requires itself"),
    ({"schema": ENDLESS}, "requires itself"),
    (
        {"schema": {"$ref": "#/$defs/b", "$defs": {"b": {"type": "array", "items": ENDLESS_REF, "minItems": 1}}}},
        "itself",
    ),
    ({"schema": {"type": "strin"}}, "JSON schema cannot be compiled: .*strin"),
    ({"schema": {"uniqueItems": True, "type": "array"}}, "cannot be compiled: .*uniqueItems"),
    ({"schema": "{"}, "JSON schema is not JSON"),
    ({"schema": 3}, "A JSON schema is an object, got int"),
    ({"schema": {"const": {1}}}, "something that is not JSON"),
    ({"regex": "a("}, r"The regular expression 'a\(' cannot be compiled: unclosed group"),
    ({"regex": ""}, "only the empty one"),
    ({"regex": "[a&&b]"}, "cannot be satisfied"),
    ({"grammar": "start: foo"}, 'The grammar cannot be compiled: .*unknown name: "foo"'),
    ({"regex": "a", "schema": {}}, "one of schema, regex and grammar, got schema and regex"),
    ({"thinking_budget": -1}, "thinking_budget is 0"),
    ({"thinking_budget": 4}, "set enable_thinking"),
    ({"tool_choice": "wether"}, r"tool_choice 'wether' is no tool of this prompt; did you mean 'weather'\?"),
    ({"tool_choice": {"function": 1}}, "tool_choice is one of auto, none, required"),
    ({"tool_choice": "required", "tools": None}, "needs tools, and this prompt has none"),
]


@pytest.mark.parametrize(("form", "message"), BAD_FORMS, ids=[str(number) for number in range(len(BAD_FORMS))])
def test_bad_forms_are_one_sentence(tokenizer, form, message):
    form = dict(form)
    tools = form.pop("tools", TOOLS)
    with pytest.raises(UserError, match=message) as caught:
        OutputForm(**form).constraint(tokenizer, tools=tools)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", ")"))


BAD_TOOLS = [
    ({"type": "array"}, "must be of type 'object', got 'array'"),
    ({"properties": {"a": {"type": "dict"}}}, "unknown type 'dict'"),
    ({"properties": {"a": {"not": {}}}}, "keyword 'not' cannot constrain"),
    ({"properties": {"a": {"enum": [1], "type": "string"}}}, "no value of an enum"),
    ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 1}}}, "minLength"),
    ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 1}}}, "minItems"),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "leads nowhere"),
    ({"properties": {}, "required": ["a"], "additionalProperties": False}, "required property 'a'"),
    ({"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}, "cannot be satisfied"),
    ({"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "string"}]}}}, "oneOf"),
    ({"properties": {"a": {"type": "string", "pattern": "a$|b"}}}, "anchors"),
    ({"properties": {"a": False}}, "false"),
    (ENDLESS, "requires itself"),
]


@pytest.mark.parametrize(("schema", "message"), BAD_TOOLS, ids=[str(number) for number in range(len(BAD_TOOLS))])
def test_bad_tool_schemas_are_one_sentence(tokenizer, schema, message):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(UserError, match=message) as caught:
        OutputForm(tool_choice="f").constraint(tokenizer, tools=[tool])
    assert "\n" not in str(caught.value)


def test_rich_tool_schemas(tokenizer):
    """References, alternatives, awkward keys and strings, free objects, tuples, limits."""
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    properties = {
        "list": {"$ref": "#/$defs/node"},
        "a:b, {c}": {"type": "boolean"},
        "Free": {"type": "object", "additionalProperties": {"type": "number"}},
        "anything": {},
        "kind": {"enum": ["x", "", '"q"\\ {,}', 1.5, None, True, ["a", {"k": 2}]]},
        "same": {"const": "c"},
        "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "minItems": 2, "maxItems": 2},
        "none": {"type": "array", "maxItems": 0},
        "one": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 1},
        "any_of": {"type": ["integer", "string"], "minimum": 3, "minLength": 2},
        "some": {"allOf": [{"type": "string"}, {"minLength": 1}, {"maxLength": 2}]},
        "find": {"type": "string", "pattern": "^b/c+$"},
        "short": {"type": "string", "maxLength": 2},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": {"node": node},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for seed in range(20):
        constraint = OutputForm(tool_choice="f", parallel_tool_calls=False).constraint(tokenizer, tools=[tool])
        assert constraint is not None
        ids = Writer(Vocabulary.of(tokenizer), seed).write(constraint, calm=150, most=4000)
        (call,) = chat_parse.parse(ids, tokenizer).tool_calls
        jsonschema.validate(call["arguments"], schema)


def test_written_calls_are_derived(tokenizer):
    """What the chat writer writes for valid arguments is a path of the grammar: the model's own notation."""
    rows = [json.loads(line) for line in assets.TRAIN.read_text().splitlines()]
    rows = [row for row in rows if any(message.get("tool_calls") for message in row["messages"])]
    checked = 0
    for row in rows[::10]:
        for message in row["messages"]:
            for call in message.get("tool_calls") or ():
                constraint = OutputForm(tool_choice="required").constraint(tokenizer, tools=row["tools"])
                assert constraint is not None
                function = call["function"]
                for token in tokenizer.encode(chat_syntax.call(function["name"], function["arguments"])):
                    assert token in allowed(constraint)
                    constraint.advance(token)
                checked += 1
    assert checked > 10


def test_constrained_calls_run(tokenizer):
    """The schema of a function's signature leads to calls that the function takes."""

    def f(a: float, b: list[tuple[int, bool]], c: Literal["x", 1, None], d: str | None = None) -> float:
        assert all(isinstance(n, int) and isinstance(yes, bool) for n, yes in b)
        assert c in ("x", 1, None)
        assert isinstance(d, str | None)
        return a

    tool = tool_of(f)
    for parsed in outputs(tokenizer, OutputForm(tool_choice="required"), 20, tools=[tool.declaration]):
        for call in parsed.tool_calls:
            assert isinstance(tool.run(call["arguments"]), float)


def test_without_llguidance_a_sentence_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs the package llguidance; pip install 'gemma4_jax\[structured\]'"):
        Grammars(tokenizer)

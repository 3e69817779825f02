"""Tool calls scored by syntax tree: the rules one by one, files of the function-calling leaderboard, and `task=eval`."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma4_jax.chat import render
from gemma4_jax.errors import UserError
from gemma4_jax.eval.call_rows import call_rows, read_answers, score
from gemma4_jax.eval.tool_calls import Expected, call_complaint, complaint
from launch.run import main

SCHEMA = {
    "type": "dict",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "limit": {"type": "float"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "exact": {"type": "boolean"},
        "area": {"type": "dict"},
    },
    "required": ["city"],
}
WANTED = Expected(
    "weather.get",
    {
        "city": ["New York", "NYC"],
        "days": [3, ""],
        "limit": [0.5, 2, ""],
        "tags": [["rain", "snow"], ""],
        "exact": [True, ""],
        "area": [{"unit": ["km", "mi"], "size": [5, ""]}, ""],
    },
    SCHEMA,
)


def call(**arguments: Any) -> dict[str, Any]:
    return {"name": "weather.get", "arguments": arguments}


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "New York"},
        {"city": "new-york."},
        {"city": "nyc", "days": 3},
        {"city": "NYC", "limit": 2},
        {"city": "NYC", "limit": 2.0},
        {"city": "NYC", "tags": ["RAIN", "s now"]},
        {"city": "NYC", "exact": True, "area": {"unit": "KM"}},
        {"city": "NYC", "area": {"unit": "mi", "size": 5}},
    ],
)
def test_accepted(arguments):
    assert call_complaint(call(**arguments), WANTED) == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "city is missing"),
        ({"city": "Boston"}, "city is 'Boston', wanted 'New York' or 'NYC'"),
        ({"city": 3}, "city is 3, wanted string"),
        ({"city": "NYC", "days": "3"}, "days is '3', wanted integer"),
        ({"city": "NYC", "days": 3.0}, "days is 3.0, wanted integer"),
        ({"city": "NYC", "days": True}, "days is True, wanted integer"),
        ({"city": "NYC", "exact": 1}, "exact is 1, wanted boolean"),
        ({"city": "NYC", "tags": ["snow", "rain"]}, "tags is"),
        ({"city": "NYC", "tags": ["rain", 2]}, "tags is"),
        ({"city": "NYC", "area": {"size": 5}}, "area is"),
        ({"city": "NYC", "area": {"unit": "km", "more": 1}}, "area is"),
        ({"city": "NYC", "wind": 2}, "wind was not asked for"),
    ],
)
def test_refused(arguments, reason):
    assert call_complaint(call(**arguments), WANTED).startswith(reason)


def test_an_argument_without_the_empty_choice_has_to_be_there():
    wanted = Expected("f", {"a": [1], "b": [2]}, {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}})
    assert call_complaint({"name": "f", "arguments": {"a": 1}}, wanted) == "b is missing"
    assert call_complaint({"name": "g", "arguments": {"a": 1}}, wanted) == "wanted f, got g"


def test_several_calls_match_in_any_order_and_each_only_once():
    """The first wanted call accepts both; taken greedily it would leave none for the second."""
    properties = {"properties": {"x": {"type": "integer"}}}
    both, one = Expected("f", {"x": [1, 2]}, properties), Expected("f", {"x": [1]}, properties)
    first, second = ({"name": "f", "arguments": {"x": x}} for x in (1, 2))
    assert complaint([first, second], [both, one]) == ""
    assert complaint([second, first], [both, one]) == ""
    assert complaint([second, second], [both, one]).startswith("no call for f(x=1): x is 2")
    assert complaint([first], [both, one]) == "wanted 2 calls, got 1"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHAT = {
    "messages": [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "t", "arguments": {"at": {"x": 1}, "of": ["a"]}}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "t", "parameters": {"properties": {"at": {}, "of": {}}}}}],
}


def test_chats_of_ones_own_and_answers_as_sampling_writes_them(tmp_path):
    rows = call_rows([write(tmp_path / "chats.jsonl", [CHAT, CHAT])])
    right = {"completion": "", "tool_calls": [{"name": "t", "arguments": {"at": {"x": 1}, "of": ["A"]}}]}
    wrong = {"completion": "", "tool_calls": [{"name": "t", "arguments": {"at": {"x": 2}, "of": ["a"]}}]}
    answers = read_answers(write(tmp_path / "answers.jsonl", [right, wrong]), rows)
    found = score(rows, answers)
    assert (found.overall.correct, found.overall.total) == (1, 2)
    assert found.wrong[0].got.startswith('t({"at": {"x": 2}, "of": ["a"]}): at is')
    with pytest.raises(UserError, match="1 answers without an id for 2 rows"):
        read_answers(write(tmp_path / "short.jsonl", [right]), rows)
    with pytest.raises(UserError, match="no answer to 2 of 2 rows"):
        read_answers(write(tmp_path / "ids.jsonl", [{**right, "id": "x"}]), rows)
    with pytest.raises(UserError, match="last message must be the assistant's"):
        call_rows([write(tmp_path / "none.jsonl", [{"messages": CHAT["messages"][:1]}])])
    with pytest.raises(UserError, match="no ground_truth for 'a_0'"):
        call_rows([write(tmp_path / "b.jsonl", [{"id": "a_0", "question": [[]], "function": []}])])


def simplest(value: Any) -> Any:
    """One of the accepted values; of a dict one of each key's."""
    if isinstance(value, dict):
        chosen = {key: [one for one in values if one != ""] for key, values in value.items()}
        return {key: simplest(values[0]) for key, values in chosen.items() if values}
    return [simplest(item) for item in value] if isinstance(value, list) else value


def right_calls(row: Any) -> list[dict[str, Any]]:
    calls = []
    for wanted in row.wanted:
        chosen = {name: [one for one in values if one != ""] for name, values in wanted.accepted.items()}
        calls.append({"name": wanted.name, "arguments": {k: simplest(v[0]) for k, v in chosen.items() if v}})
    return calls


def test_the_leaderboards_files_score_their_own_answers_and_no_others(shared_data, tmp_path, capsys):
    """Written out as the model would and parsed again: all 800 right; each answer given to the next question: none."""
    paths = [str(shared_data / f"bfcl_{name}.jsonl") for name in ("simple_python", "multiple", "parallel")]
    rows = call_rows(paths)
    assert len(rows) == 800
    texts = []
    for row in rows:
        calls = [{"function": one} for one in right_calls(row)]
        chat = render([*row.prompt["messages"], {"role": "assistant", "tool_calls": calls}], row.prompt["tools"])
        texts.append(chat[chat.rindex("<|turn>model\n") + len("<|turn>model\n") :])
    options = [
        f"--config.data.paths={','.join(paths)}",
        "--config.eval.metrics=tool_calls",
        f"--config.workdir={tmp_path}",
    ]
    for shift, wanted in ((0, 1.0), (1, 0.0)):
        shifted = [*texts[shift:], *texts[:shift]]
        answers = write(
            tmp_path / "answers.jsonl", [{"id": r.id, "text": t} for r, t in zip(rows, shifted, strict=True)]
        )
        assert main(["--config=configs/eval.py", *options, f"--config.eval.answers={answers}"]) == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        assert set(found) == {
            "tool_calls",
            *(f"tool_calls.{name}" for name in ("simple_python", "multiple", "parallel")),
        }
        assert set(found.values()) == {wanted}
    assert "overall" in capsys.readouterr().out


def test_settings_of_the_metric_that_contradict_each_other(capsys):
    common = ["--config=configs/eval.py", "--config.data.paths=x.jsonl"]
    for options, message in [
        (["--config.eval.answers=a.jsonl"], "eval.answers belongs to tool_calls"),
        (
            ["--config.eval.answers=a.jsonl", "--config.eval.metrics=tool_calls,perplexity"],
            "scored for tool_calls alone",
        ),
        (["--config.eval.metrics=tool_calls"], "config.model wants either variant or path"),
        (
            ["--config.eval.metrics=tool_calls", "--config.eval.answers=a", "--config.model.variant=tiny_e2b"],
            "scored without a model",
        ),
    ]:
        assert main([*common, *options]) == 2
        assert message in capsys.readouterr().err

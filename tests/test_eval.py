"""Held-out loss against NumPy, exact match against answers made up here, and the tables."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.eval import perplexity, report
from gemma4_jax.eval.exact_match import EvalConfig, exact_match
from gemma4_jax.eval.perplexity import evaluate_loss
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import abstract

SMALL = dict(vocab_size=128, hidden_size=64, layer_period=2, num_hidden_layers=2, sliding_window=8)


def model_of(seed: int):
    rng = np.random.default_rng(seed)
    model = abstract(ModelConfig.variant("tiny_31b", **SMALL))
    return map_arrays(lambda _, v: jnp.asarray(rng.normal(0, 0.1, v.get_value().shape), jnp.float32), model)


def batch_of(seed: int, trained: int) -> dict[str, np.ndarray]:
    """Two rows: a packed one, and one with padding; `trained` targets count."""
    rng = np.random.default_rng(seed)
    positions = np.stack([np.r_[0:12, 0:12], np.r_[0:20, [-1] * 4]]).astype(np.int32)
    weights = np.zeros(48, np.float32)
    weights[rng.permutation(40)[:trained]] = 1
    return {
        "tokens": rng.integers(3, 128, (2, 24)).astype(np.int32),
        "targets": rng.integers(3, 128, (2, 24)).astype(np.int32),
        "positions": positions,
        "segment_ids": np.stack([np.r_[[1] * 12, [2] * 12], np.r_[[1] * 20, [0] * 4]]).astype(np.int32),
        "loss_weights": weights.reshape(2, 24),
    }


def expected(model, batches) -> tuple[float, float, float]:
    """Loss, accuracy, tokens, from whole logits in float64."""
    losses, right = [], []
    for batch in batches:
        logits = np.asarray(model(*(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segment_ids"))), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        mask = batch["loss_weights"] > 0
        losses += np.take_along_axis(-logp, batch["targets"][..., None], -1)[..., 0][mask].tolist()
        right += (logits.argmax(-1) == batch["targets"])[mask].tolist()
    return float(np.mean(losses)), float(np.mean(right)), len(losses)


def test_loss_counts_every_token_once():
    """Batches with 5 and 30 trained tokens: the mean is over 35 tokens, not over two batches."""
    model, batches = model_of(0), [batch_of(1, 5), batch_of(2, 30)]
    loss, accuracy, tokens = expected(model, batches)
    got = evaluate_loss(model, iter(batches))
    assert got["tokens"] == tokens == 35
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert got["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert evaluate_loss(model, batches, max_batches=1)["tokens"] == 5
    program: Any = perplexity._sums
    size = program._cache_size()
    assert evaluate_loss(model_of(1), batches)["loss"] != got["loss"]
    assert program._cache_size() == size


def test_loss_needs_tokens():
    with pytest.raises(UserError, match="The 1 held-out batches have no trained token"):
        evaluate_loss(model_of(0), [batch_of(1, 0)])
    with pytest.raises(UserError, match="The 0 held-out batches"):
        evaluate_loss(model_of(0), [])


@dataclass
class Answer:
    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


def row(content: Any = "", calls: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    last = {"role": "assistant", "content": content}
    if calls is not None:
        last["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return {"messages": [{"role": "user", "content": "ask"}, last], **more}


CALL = {"name": "f", "arguments": {"a": 1, "b": [True, None]}}


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
    [
        (row("yes"), Answer(" yes\n"), True),
        (row("yes"), Answer("Yes"), False),
        (row([{"type": "text", "text": "yes"}]), Answer("yes"), True),
        (row(calls=[CALL]), Answer(tool_calls=[{"name": "f", "arguments": {"b": [True, None], "a": 1}}]), True),
        (
            row(None, [{"name": "f", "arguments": '{"a": 1}'}]),
            Answer(tool_calls=[{"name": "f", "arguments": {"a": 1}}]),
            True,
        ),
        (row(calls=[CALL]), Answer(tool_calls=[{"name": "g", "arguments": CALL["arguments"]}]), False),
        (row(calls=[CALL]), Answer(tool_calls=[{"name": "f", "arguments": {"a": "1", "b": [True, None]}}]), False),
        (row(calls=[CALL]), Answer(tool_calls=[{"name": "f", "arguments": {"a": True, "b": [True, None]}}]), False),
        (row(calls=[CALL]), Answer(tool_calls=[CALL, CALL]), False),
        (row(calls=[CALL]), Answer("and text", [CALL]), False),
        (row(calls=[CALL]), Answer(), False),
        (row("yes"), Answer("yes", [CALL]), False),
    ],
)
def test_what_counts_as_equal(wanted, answer, right: bool):
    result = exact_match([wanted], lambda _: [answer])
    assert (result.overall.correct, result.overall.total) == (int(right), 1)
    assert len(result.wrong) == 1 - right


def test_exact_match_by_task():
    tools = [{"type": "function"}]
    rows = [row("1", task="count"), row("2", task="count", tools=tools), row(calls=[CALL], task="call")]

    def generate(prompts):
        assert [prompt["messages"] for prompt in prompts] == [[{"role": "user", "content": "ask"}]] * 3
        assert [prompt["tools"] for prompt in prompts] == [None, tools, None]
        return [Answer("1"), Answer("3"), Answer("", [CALL])]

    result = exact_match(rows, generate)
    assert {task: (s.correct, s.total) for task, s in result.tasks.items()} == {"call": (1, 1), "count": (1, 2)}
    assert result.overall.accuracy == pytest.approx(2 / 3)
    (wrong,) = result.wrong
    assert (wrong.index, wrong.task, wrong.asked, wrong.wanted, wrong.got) == (1, "count", "ask", "2", "3")
    assert report.scores(result).splitlines() == [
        "task     right  of  exact match",
        "-------  -----  --  -----------",
        "call         1   1      100.0 %",
        "count        1   2       50.0 %",
        "overall      2   3       66.7 %",
    ]
    assert report.wrong_answers(result.wrong).splitlines()[0] == "row 2 (count)"
    assert report.wrong_answers(result.wrong * 3, most=1).endswith("and 2 more")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "exact match needs at least one held-out row, got none."),
        (
            [{"messages": [{"role": "assistant", "content": "x"}]}],
            'row 1: exact match needs "messages" with a question',
        ),
        (
            [row("x"), {"messages": row()["messages"][::-1]}],
            "row 2: the last message is what is expected, so it must be",
        ),
        ([row(calls=[{"arguments": {}}])], "row 1: a tool call of the last message cannot be read (KeyError('name'))."),
    ],
)
def test_rows_that_expect_nothing(rows, sentence: str):
    with pytest.raises(UserError) as caught:
        exact_match(rows, lambda prompts: [Answer() for _ in prompts])
    assert str(caught.value).startswith(sentence)


def test_settings():
    wrong: list[dict[str, Any]] = [{"metrics": ()}, {"max_examples": 0}, {"show_wrong": -1}]
    for options in wrong:
        with pytest.raises(UserError, match=f"eval.{next(iter(options))}"):
            EvalConfig(**options)


def test_table():
    text = report.table(("what", "loss", "n"), [("before", 12.3456789, 1234567), ("after", None, 5)])
    assert text.splitlines() == [
        "what     loss          n",
        "------  -----  ---------",
        "before  12.35  1,234,567",
        "after       -          5",
    ]
    assert report.table(("a",), []).splitlines() == ["a", "-"]
    with pytest.raises(ValueError, match="each row needs 2 cells"):
        report.table(("a", "b"), [(1,)])
    values = {"loss": 1.25, "perplexity": 3.49, "accuracy": 0.5, "tokens": 1200.0}
    want = "loss 1.2500  perplexity 3.490  next-token accuracy 50.0 %  over 1,200 tokens"
    assert report.losses(values) == want

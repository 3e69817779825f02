"""Exact match: does the answer to a held-out conversation equal the one the data give?

Text is compared without the blanks around it; tool calls by name and arguments, in order. A thought does not count.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gemma4_jax.errors import UserError
from gemma4_jax.options import option

Row = Mapping[str, Any]
NO_TASK = "all"


@dataclass(frozen=True)
class EvalConfig:
    """What to measure."""

    metrics: tuple[Literal["perplexity", "exact_match", "tool_calls"], ...] = option(
        ("perplexity", "exact_match"), "what to report; tool_calls: by syntax tree, of chats or BFCL files"
    )
    truth: tuple[str, ...] = option(
        (), "of tool_calls: files of accepted answers; none: X.answers.jsonl beside X.jsonl"
    )
    answers: str | None = option(
        None, "of tool_calls: score the calls in this file, as sample writes them, and ask no model"
    )
    against: dict[str, str] = option(
        factory=dict, help="quantised checkpoints of the model, which is then their float reference: name -> path"
    )
    max_examples: int | None = option(None, "how many rows; none: all")
    show_wrong: int = option(5, "how many wrong answers to print")

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(
                "eval.metrics is empty, so nothing would be measured; name some of perplexity, exact_match and tool_calls."
            )
        if (self.answers is not None or self.truth) and "tool_calls" not in self.metrics:
            key = "truth" if self.truth else "answers"
            raise UserError(f"eval.{key} belongs to tool_calls, which eval.metrics does not name; add it.")
        if self.answers is not None and self.metrics != ("tool_calls",):
            raise UserError(
                "eval.answers asks no model, so it is scored for tool_calls alone; set eval.metrics=tool_calls."
            )
        if self.against and ("tool_calls" in self.metrics or "perplexity" not in self.metrics):
            raise UserError(
                "eval.against compares perplexity, and exact match if asked; eval.metrics must name perplexity, and no tool_calls."
            )
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"eval.max_examples is none or at least 1, got {self.max_examples}.")
        if self.show_wrong < 0:
            raise UserError(f"eval.show_wrong is at least 0, got {self.show_wrong}.")


class Answer(Protocol):
    """What is compared of a completion."""

    @property
    def text(self) -> str: ...
    @property
    def tool_calls(self) -> list[dict[str, Any]]: ...


Generate = Callable[[Sequence[Row]], Sequence[Answer]]
"""Conversations {"messages", "tools"} without their last answer -> one completion each."""


@dataclass(frozen=True)
class Score:
    """Right answers among `total`."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Wrong:
    """A row whose answer was another: what was asked last, wanted and got, as text."""

    index: int
    task: str
    asked: str
    wanted: str
    got: str


@dataclass(frozen=True)
class ExactMatch:
    """Scores overall and by the rows' "task", and every wrong answer in the order of the rows."""

    overall: Score
    tasks: dict[str, Score]
    wrong: list[Wrong] = field(default_factory=list)


def exact_match(rows: Sequence[Row], generate: Generate) -> ExactMatch:
    """Asks `generate` for the last assistant message of each row {"messages", "tools"?, "task"?} and compares.

    Raises:
        UserError: no rows, or a row whose last message is not the assistant's, or that has nothing before it.
    """
    if not rows:
        raise UserError("exact match needs at least one held-out row, got none.")
    wanted = [_expectation(index, row) for index, row in enumerate(rows)]
    prompts = [{"messages": list(row["messages"][:-1]), "tools": row.get("tools")} for row in rows]
    answers = generate(prompts)
    if len(answers) != len(rows):
        raise ValueError(f"generate must return one completion per row: {len(rows)} rows, {len(answers)} completions.")
    wrong: list[Wrong] = []
    counts: dict[str, list[int]] = {}
    for index, (row, want, answer) in enumerate(zip(rows, wanted, answers, strict=True)):
        task = str(row.get("task") or NO_TASK)
        got = _canonical(answer.text, answer.tool_calls)
        count = counts.setdefault(task, [0, 0])
        count[0] += got == want
        count[1] += 1
        if got != want:
            asked = _text(row["messages"][-2].get("content"))
            wrong.append(Wrong(index, task, asked, _readable(want), _readable(got)))
    tasks = {task: Score(*counts[task]) for task in sorted(counts)}
    return ExactMatch(Score(len(rows) - len(wrong), len(rows)), tasks, wrong)


Canonical = tuple[str, tuple[tuple[str, str], ...]]
"""Stripped text, and (name, arguments as JSON with sorted keys) of each call: 1, 1.0, true and "1" all differ."""


def _expectation(index: int, row: Row) -> Canonical:
    """What the last message of a row says."""
    where = f"row {index + 1}"
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or len(messages) < 2:
        raise UserError(f'{where}: exact match needs "messages" with a question and an answer.')
    last = messages[-1]
    if last.get("role") != "assistant":
        raise UserError(
            f"{where}: the last message is what is expected, so it must be the assistant's, not {last.get('role')!r}."
        )
    calls = [call.get("function", call) for call in last.get("tool_calls") or ()]
    try:
        return _canonical(_text(last.get("content")), calls)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: a tool call of the last message cannot be read ({error!r}).") from None


def _canonical(text: str, calls: Sequence[Mapping[str, Any]]) -> Canonical:
    def arguments(value: Any) -> str:
        return json.dumps(json.loads(value) if isinstance(value, str) else value, sort_keys=True, ensure_ascii=False)

    return text.strip(), tuple((call["name"], arguments(call.get("arguments") or {})) for call in calls)


def _text(content: Any) -> str:
    """The text of a message's content, whose parts are joined."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def _readable(answer: Canonical) -> str:
    text, calls = answer
    return " ".join([*(f"{name}({arguments})" for name, arguments in calls), *([text] if text else [])]) or "(nothing)"

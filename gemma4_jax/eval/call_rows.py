"""Rows whose right answer is tool calls: files of the Berkeley Function Calling Leaderboard, or chats of one's own.

BFCL: `X.jsonl` with {"id", "question": [[message, ...]], "function": [schema, ...]} and beside it `X.answers.jsonl` with
{"id", "ground_truth": [{function: {argument: [accepted, ...]}}, ...]}. A chat {"messages", "tools"} wants the calls of its last
message, each argument as it stands there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_jax.chat_parse import parse
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.eval.exact_match import Answer, ExactMatch, Score, Wrong
from gemma4_jax.eval.tool_calls import Call, Expected, complaint

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""BFCL's names of types that JSON Schema does not have."""


@dataclass(frozen=True)
class CallRow:
    """What is asked, with which tools, and the calls that are wanted. `task`: what scores are grouped by."""

    where: str
    id: str
    task: str
    prompt: dict[str, Any]
    wanted: tuple[Expected, ...]


def call_rows(paths: Sequence[str], truth: Sequence[str] = ()) -> list[CallRow]:
    """The rows of files; `truth`: files of accepted answers, none: each file's own `X.answers.jsonl`.

    Raises:
      UserError: rows that are neither kind, or have no right answer.
    """
    answers: dict[str, Any] = {}
    rows: list[CallRow] = []
    for path in paths:
        beside = Path(path).with_suffix(".answers.jsonl")
        named = truth or ([str(beside)] if beside.is_file() else [])
        for row in FileRows(named) if named else ():
            content = _object(row.where, row.data)
            answers[str(content.get("id"))] = content.get("ground_truth")
        rows += [_row(row.where, _object(row.where, row.data), Path(path), answers) for row in FileRows([path])]
    return rows


def score(rows: Sequence[CallRow], answers: Sequence[Answer | Sequence[Call]]) -> ExactMatch:
    """Right answers overall and by task; `wrong` says of each other one what was wrong first."""
    if not rows:
        raise UserError("Tool-call accuracy needs at least one row, got none.")
    counts: dict[str, list[int]] = {}
    wrong: list[Wrong] = []
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        calls = answer if isinstance(answer, Sequence) else answer.tool_calls
        reason = complaint(calls, row.wanted)
        count = counts.setdefault(row.task, [0, 0])
        count[0] += not reason
        count[1] += 1
        if reason:
            asked = str(row.prompt["messages"][-1].get("content") or "")
            got = " ".join(f"{call['name']}({json.dumps(call.get('arguments'), ensure_ascii=False)})" for call in calls)
            wrong.append(Wrong(index, row.id, asked, " ".join(map(str, row.wanted)), f"{got or '(no call)'}: {reason}"))
    tasks = {task: Score(*counts[task]) for task in sorted(counts)}
    return ExactMatch(Score(len(rows) - len(wrong), len(rows)), tasks, wrong)


def asked(rows: Sequence[CallRow], generate: Callable[[Sequence[dict[str, Any]]], Sequence[Answer]]) -> ExactMatch:
    """The score of what `generate` answers."""
    return score(rows, generate([row.prompt for row in rows]))


def read_answers(path: str, rows: Sequence[CallRow]) -> list[list[Call]]:
    """The calls in a file of answers: rows {"tool_calls": [...]} as `sample` writes them, or {"text": what a model wrote}.

    They belong to the rows by "id", or without ids in order.

    Raises:
      UserError: a row that is neither kind, or rows without an answer.
    """
    found, ordered = {}, []
    for row in FileRows([path]):
        content = _object(row.where, row.data)
        if isinstance(content.get("text"), str):
            calls = parse(content["text"]).tool_calls
        elif isinstance(content.get("tool_calls"), list):
            calls = [call.get("function", call) for call in content["tool_calls"]]
        else:
            raise UserError(f'{row.where} is no answer: it has neither "tool_calls" nor "text".')
        ordered.append(calls)
        if "id" in content:
            found[str(content["id"])] = calls
    if not found:
        if len(ordered) != len(rows):
            raise UserError(f"{path} has {len(ordered)} answers without an id for {len(rows)} rows; give them ids.")
        return ordered
    missing = [row.id for row in rows if row.id not in found]
    if missing:
        raise UserError(f"{path} has no answer to {len(missing)} of {len(rows)} rows, among them {missing[0]!r}.")
    return [found[row.id] for row in rows]


def _row(where: str, content: dict[str, Any], path: Path, answers: Mapping[str, Any]) -> CallRow:
    if "question" in content and "function" in content:
        return _bfcl_row(where, content, path, answers)
    if "messages" in content:
        return _chat_row(where, content, path)
    raise UserError(f'{where} is neither a BFCL row ("question", "function") nor a chat ("messages").')


def _bfcl_row(where: str, content: dict[str, Any], path: Path, answers: Mapping[str, Any]) -> CallRow:
    name = str(content.get("id"))
    if not isinstance(answers.get(name), list):
        raise UserError(
            f"{where} has no right answer: there is no ground_truth for {name!r}; name the file that has them with eval.truth."
        )
    turns, functions = content["question"], content["function"]
    if not isinstance(turns, list) or len(turns) != 1:
        raise UserError(f"{where} has {len(turns)} turns; only questions of one turn are measured.")
    functions = functions if isinstance(functions, list) else [functions]
    schemas = {function["name"]: function.get("parameters") or {} for function in functions}
    tools = [{"type": "function", "function": {**f, "parameters": json_schema(f.get("parameters"))}} for f in functions]
    wanted = []
    for call in answers[name]:
        for function, accepted in call.items():
            if function not in schemas:
                raise UserError(
                    f"{where}: the right answer calls {function!r}, which is not among the row's functions."
                )
            wanted.append(Expected(function, accepted, schemas[function]))
    return CallRow(
        where, name, name.rsplit("_", 1)[0] or path.stem, {"messages": turns[0], "tools": tools}, tuple(wanted)
    )


def _chat_row(where: str, content: dict[str, Any], path: Path) -> CallRow:
    messages = content["messages"]
    last = messages[-1] if isinstance(messages, list) and messages else {}
    calls = [call.get("function", call) for call in last.get("tool_calls") or ()]
    if last.get("role") != "assistant" or len(messages) < 2 or not calls:
        raise UserError(f"{where}: the last message must be the assistant's and call tools; it is what is expected.")
    declared = [tool.get("function", tool) for tool in content.get("tools") or ()]
    schemas = {tool["name"]: tool.get("parameters") or {} for tool in declared}
    wanted = []
    for call in calls:
        arguments = call.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        schema = schemas.get(call["name"]) or {"properties": {key: {} for key in arguments}}
        wanted.append(Expected(call["name"], {name: [_accepted(value)] for name, value in arguments.items()}, schema))
    prompt = {"messages": messages[:-1], "tools": content.get("tools")}
    task = str(content.get("task") or path.stem)
    return CallRow(where, str(content.get("id") or where), task, prompt, tuple(wanted))


def _accepted(value: Any) -> Any:
    """An argument as `Expected` has it: the values of a dict are lists of what is accepted."""
    if isinstance(value, dict):
        return {key: [_accepted(inner)] for key, inner in value.items()}
    return [_accepted(inner) for inner in value] if isinstance(value, list) else value


def json_schema(schema: Any) -> Any:
    """A BFCL schema as JSON Schema, which tools are declared in."""
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: json_schema(inner) for key, inner in schema.items()}
    if isinstance(schema.get("type"), str):
        made["type"] = JSON_TYPES.get(schema["type"], schema["type"])
        if made["type"] is None:
            del made["type"]
    return made


def _object(where: str, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not an object.")
    return content

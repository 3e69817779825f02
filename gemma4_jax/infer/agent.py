"""The agent loop: the model calls Python functions and reads their results until it answers.

    run = run_agent(sampler, "Will it rain in Oslo?", [weather], max_turns=4)
    run.answer, run.reason, run.messages

It needs nothing of a sampler but `generate`. What a function raises becomes its result, for the model to read.
"""

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.infer.tool_choice import ToolChoice
from gemma4_jax.infer.tools import Parts, Tool, tools_of
from gemma4_jax.tokenizer import SPECIAL_PIECES

Reason = Literal["answer", "max_turns", "malformed", "length", "cancelled", "error"]
SPECIAL = re.compile("|".join(re.escape(piece) for name, piece in SPECIAL_PIECES.items() if name != "newline"))


class Sampling(Protocol):
    """What the loop needs of a sampler: `Sampler.generate`, or anything that takes conversations likewise."""

    def generate(self, prompts: Sequence[Any], /, **options: Any) -> Sequence[Any]: ...


@dataclasses.dataclass(frozen=True)
class AgentRun:
    """How a run went.

    Attributes:
        answer: the last turn's text.
        reason: why it ended: an answer; max_turns, with calls in the last turn that were not run; malformed, a turn held calls
            that could not be read and none that could; or the finish reason of a turn that did not come to its end.
        messages: the conversation, to go on from: the given messages, then calls, results and the answer.
        completions: what the sampler returned, one a turn.
    """

    answer: str
    reason: Reason
    messages: list[dict[str, Any]]
    completions: list[Any]


def run_agent(
    sampler: Sampling,
    messages: str | Sequence[Mapping[str, Any]],
    tools: Iterable[Callable[..., Any] | Tool],
    *,
    max_turns: int = 8,
    tool_choice: ToolChoice = "auto",
    seed: int = 0,
    **sampling: Any,
) -> AgentRun:
    """Lets the model answer with the help of functions.

    Args:
        sampler: a Sampler.
        messages: the conversation so far, or one user message.
        tools: functions, see `tools`.
        max_turns: most calls of the sampler.
        tool_choice: of the first turn; later ones choose freely, or there would be no answer.
        seed: turn i draws with seed + i.
        sampling: further arguments of `generate`.

    Raises:
        UserError: no tools, a function that cannot be a tool, max_turns below 1, or what `generate` raises.
    """
    known = tools_of(tools)
    if not known:
        raise UserError("An agent needs at least one tool, got none; without tools use Sampler.generate.")
    if max_turns < 1:
        raise UserError(f"max_turns is at least 1, got {max_turns}.")
    declared = [tool.declaration for tool in known.values()]
    history = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    completions: list[Any] = []
    while True:
        turn = len(completions)
        options = sampling if turn or tool_choice == "auto" else {**sampling, "tool_choice": tool_choice}
        prompt = {"messages": history, "tools": declared}
        (completion,) = sampler.generate([prompt], seed=(seed + turn) % 2**32, **options)
        completions.append(completion)
        message = _spoken(completion, turn)
        if message is not None:
            history = [*history, message]
        reason = _ended(completion, last=turn + 1 == max_turns)
        if reason is not None:
            return AgentRun(completion.text, reason, history, completions)
        history = [*history, *(_result(call, known) for call in (message or {})["tool_calls"])]


def _spoken(completion: Any, turn: int) -> dict[str, Any] | None:
    """A completion as a message; None if there is nothing in it."""
    message: dict[str, Any] = {"role": "assistant", "content": harmless(completion.text)}
    if completion.thought:
        message["reasoning"] = harmless(completion.thought)
    if completion.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{turn}_{number}", "type": "function", "function": harmless(call)}
            for number, call in enumerate(completion.tool_calls)
        ]
    return message if completion.text or completion.tool_calls else None


def _ended(completion: Any, last: bool) -> Reason | None:
    """Why the run is over after this turn; None when it goes on with results."""
    if completion.finish_reason != "stop":
        return completion.finish_reason
    if not completion.tool_calls:
        return "malformed" if completion.malformed else "answer"
    return "max_turns" if last else None


def _result(call: Mapping[str, Any], tools: Mapping[str, Tool]) -> dict[str, Any]:
    """Runs a call; the message with its result, or with what went wrong."""
    name = call["function"]["name"]
    try:
        if name not in tools:
            raise UserError(f"There is no tool {name!r}; {did_you_mean(name, list(tools))}")
        content = content_of(tools[name].run(call["function"]["arguments"]))
    except Exception as error:  # whatever a tool raises is for the model to read
        content = {"error": harmless(f"{type(error).__name__}: {error}")}
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}


def content_of(value: Any) -> Any:
    """A function's result as the content of a tool message: text, an object, or the content parts of `Parts`."""
    if isinstance(value, Parts):
        return [
            {**part, "text": harmless(part["text"])} if part["type"] == "text" else dict(part) for part in value.parts
        ]
    plain = harmless(_plain(value))
    return {"value": plain} if isinstance(plain, list) else plain


def harmless(value: Any) -> Any:
    """`value` with the special strings in its texts broken up: written into a prompt they would be special tokens.

    A tool's result may come from anywhere; without this, text like `<turn|>` in it could end the turn and begin another.
    """
    if isinstance(value, str):
        return SPECIAL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
    if isinstance(value, Mapping):
        return {harmless(key): harmless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Any Python value in JSON's types; what has no place there by its `str`."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    to_list = getattr(value, "tolist", None)  # arrays and their scalars
    return str(value) if to_list is None else _plain(to_list())

"""A conversation that cannot be rendered is refused in one sentence that names the message, and in a word for statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma4_jax.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = ("text", "image", "audio", "video")


class ChatError(UserError):
    """A conversation that cannot be used. `reason` is the kind of fault in a few words, the same for all rows that have it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


def nearest(name: object, known: Sequence[str]) -> str:
    """`did you mean ...? (known: ...)` for a role or part type, other formats' names for them included."""
    others = {"model": "assistant", "human": "user", "gpt": "assistant", "bot": "assistant", "function": "tool"}
    others |= {"image_url": "image", "input_audio": "audio", "input_text": "text", "output_text": "text"}
    guess = others.get(str(name), str(name))
    return did_you_mean(guess if guess in known else str(name), known)


def check_messages(messages: object) -> None:
    """Raises ChatError unless `messages` is a non-empty list of messages `chat.render` can write."""
    if not isinstance(messages, list | tuple):
        raise ChatError(
            "messages is not a list", f"messages must be a list of messages, got {type(messages).__name__}."
        )
    if not messages:
        raise ChatError("no messages", "A conversation needs at least one message, got an empty list.")
    calling = False  # the assistant message before this one called tools and waits for results
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ChatError("message is not an object", f"{where} must be an object, got {type(message).__name__}.")
        role = message.get("role")
        if role not in ROLES:
            raise ChatError("unknown role", f"{where} has the unknown role {role!r}; {nearest(role, ROLES)}")
        _check_content(message, where, index)
        if role == "tool":
            if not calling:
                text = f"{where} is a tool result, but no assistant message with tool_calls stands directly before it."
                raise ChatError("tool result without a call", text)
            continue
        calling = False
        for key in ("tool_calls", "tool_responses"):
            if message.get(key) and role != "assistant":
                raise ChatError(
                    f"{key} outside assistant", f"{where} has {key}, but its role is {role!r}, not 'assistant'."
                )
        _check_calls(message, where)
        calling = bool(message.get("tool_calls")) and not message.get("tool_responses")


def check_trainable(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ChatError when there is no assistant message to learn from."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ChatError(
            "no assistant turn", "The conversation has no assistant message, so there is nothing to train on."
        )


def check_tools(tools: object) -> None:
    """Raises ChatError unless `tools` is None or a list of `{"type": "function", "function": {"name": ..}}`."""
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        raise ChatError("tools is not a list", f"tools must be a list, got {type(tools).__name__}.")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            text = f'tools[{index}] must be {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}.'
            raise ChatError("malformed tool", text)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if not isinstance(parameters, Mapping | None) or not isinstance(properties, Mapping | None):
            text = (
                f"tools[{index}] ({function['name']}): parameters and their properties must be objects (a JSON schema)."
            )
            raise ChatError("malformed tool", text)


def _check_content(message: Mapping[str, Any], where: str, index: int) -> None:
    """Content is a string, a list of parts, or absent beside tool calls; a tool's may be any JSON value."""
    role, content = message["role"], message.get("content")
    if content is None:
        if role == "assistant" and (message.get("tool_calls") or message.get("tool_responses")):
            return
        if role == "tool" and "content" in message:
            return
        raise ChatError("missing content", f"{where} ({role}) has no content; give a string or a list of parts.")
    if isinstance(content, list | tuple):
        _check_parts(content, where, text_only=index == 0 and role in ("system", "developer"))
    elif not isinstance(content, str) and role != "tool":
        text = f"{where} ({role}): content must be a string or a list of parts, got {type(content).__name__}."
        raise ChatError("content is not text", text)
    for key in ("reasoning", "reasoning_content"):
        if not isinstance(message.get(key), str | None):
            raise ChatError(
                f"{key} is not text", f"{where}: {key} must be a string, got {type(message[key]).__name__}."
            )


def _check_parts(parts: Sequence[Any], where: str, text_only: bool) -> None:
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PARTS:
            text = f"{where}.content[{number}] has the unknown type {kind!r}; {nearest(kind, PARTS)}"
            raise ChatError("unknown content part", text)
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ChatError("missing content", f'{where}.content[{number}] is a text part without a string "text".')
        if kind != "text" and text_only:
            raise ChatError(
                "media in the system turn", f"{where}.content[{number}]: the system turn takes text, got {kind}."
            )


def _check_calls(message: Mapping[str, Any], where: str) -> None:
    """Each call has a function name and a mapping of arguments; each embedded response has its `response`."""
    for key in ("tool_calls", "tool_responses"):
        if not isinstance(message.get(key), list | tuple | None):
            raise ChatError(f"{key} is not a list", f"{where}.{key} must be a list, got {type(message[key]).__name__}.")
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            text = f'{where}.tool_calls[{number}] must be {{"function": {{"name": ..., "arguments": {{...}}}}}}.'
            raise ChatError("malformed tool call", text)
        if not isinstance(function.get("arguments"), Mapping | None):
            kind = type(function["arguments"]).__name__
            text = f"{where}.tool_calls[{number}] ({function['name']}): arguments must be an object, got {kind}"
            text += "; decode the JSON string first." if kind == "str" else "."
            raise ChatError("tool arguments are not an object", text)
    for number, result in enumerate(message.get("tool_responses") or ()):
        if not isinstance(result, Mapping) or "response" not in result:
            text = f'{where}.tool_responses[{number}] must be {{"name": ..., "response": ...}}.'
            raise ChatError("malformed tool response", text)

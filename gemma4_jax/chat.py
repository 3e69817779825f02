"""A conversation becomes the text that the published Gemma 4 chat template gives, in spans that say what is trained.

`render` is the join of `render_spans`, so the text and the loss mask come from one code path. Written in Python, not in
Jinja: a template out of a checkpoint is code, and its assistant mask is all zeros anyway.

What is trained is what the model must write itself: the thought, the tool calls, the answer, and the token that stops it,
`<turn|>` after an answer and `<|tool_response>` after tool calls (generation ends there and the caller goes on with
`response:...`). All else is given to it: prompts, tool results, `<|turn>model\\n`, the empty thought channel of a
generation prompt, and the newline after `<turn|>`.

Messages are OpenAI-style: `{"role", "content"}` with content a string or parts `{"type": "text", "text": ...}`,
`{"type": "image" | "audio" | "video"}`; `tool_calls` with `arguments` as a mapping; results either as following messages of
role `tool` or in `tool_responses` of the assistant message; a thought in `reasoning` or `reasoning_content`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma4_jax import chat_syntax
from gemma4_jax.chat_check import check_messages, check_tools

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
TRAIN_ON = ("assistant", "last")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text. `message` is the index of the message it comes from, None for the frame around them.

    `role`: bos, system, user, assistant, thought, tool_call, tool_response, stop (the token that ends generation) or turn
    (turn markers and the generation prompt).
    """

    text: str
    role: str
    trained: bool = False
    message: int | None = None


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    enable_thinking: bool = False,
    add_generation_prompt: bool = False,
    empty_thought: bool = True,
    as_generated: bool = False,
) -> str:
    """The text of a conversation; arguments as in `render_spans`."""
    spans = render_spans(
        messages,
        tools,
        enable_thinking=enable_thinking,
        add_generation_prompt=add_generation_prompt,
        empty_thought=empty_thought,
        as_generated=as_generated,
    )
    return "".join(span.text for span in spans)


def render_spans(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    enable_thinking: bool = False,
    add_generation_prompt: bool = False,
    empty_thought: bool = True,
    as_generated: bool = False,
    train_on: str = "assistant",
) -> list[Span]:
    """The spans of a conversation, in order.

    Args:
        messages: the conversation, a system or developer message first if there is one.
        tools: function tools with JSON schemas.
        enable_thinking: ask for a thought, by `<|think|>` in the system turn.
        add_generation_prompt: end with what the model continues from.
        empty_thought: without thinking, the generation prompt has an empty thought channel. True in the template of 26B
            and 31B, False in that of E2B and E4B.
        as_generated: for training. The template writes a finished answer without what stood before it when it was
            generated; True writes the last model turn as generated: after the empty thought channel where the generation
            prompt has one, and, with thinking, after its own thought (which the template keeps before tool calls only).
        train_on: "assistant" trains every assistant message, "last" those of the last model turn.

    Raises:
        ChatError: a message or tool that cannot be rendered; says which and why.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on is one of {', '.join(TRAIN_ON)}, got {train_on!r}.")
    check_messages(messages)
    check_tools(tools)
    spans = [Span("<bos>", "bos")]
    first = 1 if messages[0]["role"] in ("system", "developer") else 0
    if first or tools or enable_thinking:
        spans.extend(_system_turn(messages[0] if first else None, tools, enable_thinking))
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    last_turn = _last_model_turn(messages)
    before = None  # kind of what was written last: decides how a turn ends and whether a new one must be opened
    for index in range(first, len(messages)):
        message = messages[index]
        if message["role"] == "tool":
            continue  # written with the assistant message that called
        thinks = index > last_user and (message.get("tool_calls") or (as_generated and enable_thinking))
        thought = message.get("reasoning") or message.get("reasoning_content") if thinks else None
        opening = _opening(messages, first, index)
        if (
            opening
            and as_generated
            and empty_thought
            and not enable_thinking
            and index == last_turn.start
            and not thought
        ):
            opening += EMPTY_THOUGHT
        trained = message["role"] == "assistant" and (train_on == "assistant" or index in last_turn)
        if opening:
            spans.append(Span(opening, "turn", message=index))
        body, before = _body(messages, index, thought, trained)
        spans.extend(body)
    if add_generation_prompt and before not in ("tool_call", "tool_response"):
        prompt = "<|turn>model\n" + (EMPTY_THOUGHT if empty_thought and not enable_thinking else "")
        spans.append(Span(prompt, "turn"))
    return [span for span in spans if span.text]


def _system_turn(message: Message | None, tools: Sequence[Mapping[str, Any]] | None, thinking: bool) -> Iterator[Span]:
    """The first turn: `<|think|>`, the system text, the tool declarations."""
    text = "<|turn>system\n" + ("<|think|>\n" if thinking else "")
    if message is not None:
        content = message["content"]
        if isinstance(content, str):
            text += content.strip()
        else:
            text += "".join(part["text"].strip() + " " for part in content)
    text += "".join(chat_syntax.declaration(tool) for tool in tools or ())
    yield Span(text + "<turn|>\n", "system", message=None if message is None else 0)


def _last_model_turn(messages: Sequence[Message]) -> range:
    """Indices of the messages of the last model turn: the last assistant message and the calls and results before it."""
    stop = len(messages)
    while stop and messages[stop - 1]["role"] != "assistant":
        stop -= 1
    start = stop
    while start and messages[start - 1]["role"] in ("assistant", "tool"):
        start -= 1
    return range(start, stop)


def _opening(messages: Sequence[Message], first: int, index: int) -> str:
    """`<|turn>role\\n`, or nothing where an assistant message goes on in the turn of the one before it."""
    role = messages[index]["role"]
    previous = next((m["role"] for m in reversed(messages[first:index]) if m["role"] != "tool"), None)
    if role == previous == "assistant":
        return ""
    return f"<|turn>{'model' if role == 'assistant' else role}\n"


def _body(messages: Sequence[Message], index: int, thought: str | None, trained: bool) -> tuple[list[Span], str | None]:
    """A message after its opening, and the kind of its last part (tool_call, tool_response, a medium, or None)."""
    message = messages[index]
    role = message["role"]
    spans = []
    kind = None
    if thought:
        spans.append(Span(f"<|channel>thought\n{thought}\n<channel|>", "thought", trained, index))
    calls = message.get("tool_calls") or ()
    for call in calls:
        function = call["function"]
        spans.append(
            Span(chat_syntax.call(function["name"], function.get("arguments") or {}), "tool_call", trained, index)
        )
        kind = "tool_call"
    results = list(_tool_results(messages, index))
    for number, (name, result, media) in enumerate(results):
        # The marker after the calls is the model's own stop token; those between results are given.
        own = trained and bool(calls) and number == 0
        spans.append(Span("<|tool_response>", "stop" if own else "tool_response", own, index))
        spans.append(Span(chat_syntax.response(name, result) + media, "tool_response", message=index))
        kind = "tool_response"
    content = list(_content(message.get("content"), role))
    for part, text in content:
        spans.append(Span(text, role, trained and part == "text", index))
        kind = kind if part == "text" else part
    if kind == "tool_call":
        spans.append(Span("<|tool_response>", "stop", trained, index))
    elif not results or "".join(text for _, text in content).strip():
        spans.append(Span("<turn|>", "stop" if role == "assistant" else "turn", trained, index))
        spans.append(Span("\n", "turn", message=index))
    return spans, kind


def _tool_results(messages: Sequence[Message], index: int) -> Iterator[tuple[str, Any, str]]:
    """(tool name, result, media placeholders) of every result that belongs to the message at `index`."""
    message = messages[index]
    if message.get("tool_responses"):
        for result in message["tool_responses"]:
            yield result.get("name", "unknown"), result["response"], ""
        return
    if not message.get("tool_calls"):
        return
    for follow in messages[index + 1 :]:
        if follow["role"] != "tool":
            return
        name = follow.get("name") or "unknown"
        for call in message["tool_calls"]:
            if call.get("id") == follow.get("tool_call_id"):
                name = call["function"]["name"]
        body = follow.get("content")
        if isinstance(body, list | tuple):
            text = "".join(part.get("text", "") for part in body if part["type"] == "text")
            yield name, text, "".join(f"<|{part['type']}|>" for part in body if part["type"] != "text")
        else:
            yield name, body, ""


def _content(content: Any, role: str) -> Iterator[tuple[str, str]]:
    """(part type, text) of a message's content: text trimmed, old thoughts cut from the model's own."""
    clean = _without_thoughts if role == "assistant" else str.strip
    if isinstance(content, str):
        yield "text", clean(content)
        return
    for part in content or ():
        if part["type"] == "text":
            yield "text", clean(part["text"])
        else:
            yield part["type"], f"<|{part['type']}|>"


def _without_thoughts(text: str) -> str:
    """`text` without what stands between `<|channel>` and `<channel|>`, trimmed."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>")).strip()

"""Images, audio and video of a conversation: in the order in which their placeholders are rendered, and in place of them."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gemma4_jax.chat import Span
from gemma4_jax.chat_check import ChatError

PLACEHOLDER = re.compile(r"<\|(image|audio|video)\|>")

P = TypeVar("P")


def media_parts(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it stands, part) of every part that is not text: those of tool results with the message that called."""
    found = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            continue
        if message.get("tool_calls") and not message.get("tool_responses"):
            for number, result in _results(messages, index):
                found += _parts(result, number)
        found += _parts(message, index)
    return found


def expanded(
    spans: Sequence[Span],
    messages: Sequence[Mapping[str, Any]],
    expand: Callable[[Mapping[str, Any], str], tuple[str, list[P]]],
) -> tuple[list[Span], list[P]]:
    """The spans with each placeholder replaced by what `expand(part, where)` says, and all pieces in order.

    Raises:
      ChatError: a text has a placeholder of its own, so that there are more of them than media.
    """
    parts = media_parts(messages)
    found = [match[1] for span in spans for match in PLACEHOLDER.finditer(span.text)]
    if found != [part["type"] for _, part in parts]:
        given = _counted(part["type"] for _, part in parts)
        text = (
            f"The conversation has {len(found)} placeholders ({_counted(found)}) for {len(parts)} media ({given}); "
            "text may not hold <|image|>, <|audio|> or <|video|>."
        )
        raise ChatError("placeholders without media", text)
    rest, pieces, out = iter(parts), [], []

    def replacement(_match: re.Match[str]) -> str:
        where, part = next(rest)
        text, own = expand(part, where)
        pieces.extend(own)
        return text

    for span in spans:
        out.append(dataclasses.replace(span, text=PLACEHOLDER.sub(replacement, span.text)))
    return out, pieces


def _results(messages: Sequence[Mapping[str, Any]], index: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The tool messages that follow the one at `index`."""
    for number in range(index + 1, len(messages)):
        if messages[number]["role"] != "tool":
            return
        yield number, messages[number]


def _parts(message: Mapping[str, Any], index: int) -> list[tuple[str, Mapping[str, Any]]]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return []
    return [(f"messages[{index}].content[{n}]", part) for n, part in enumerate(content) if part["type"] != "text"]


def _counted(kinds: Any) -> str:
    kinds = list(kinds)
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("image", "audio", "video") if kind in kinds) or "none"

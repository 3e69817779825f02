"""What a user gives becomes token ids: text, conversations, ids; and prompts read from files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gemma4_jax.data.source import FileRows, Row
from gemma4_jax.errors import UserError
from gemma4_jax.media.pieces import Piece
from gemma4_jax.options import option
from gemma4_jax.processor import Processor

Prompt = str | Sequence[Any] | np.ndarray | Mapping[str, Any]
"""Raw text, which gets a BOS; token ids; a list of messages; or {"messages": [...], "tools": [...]}."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, whether the answer is a chat turn to be parsed, and pictures and sounds among the tokens."""

    tokens: list[int]
    chat: bool
    media: tuple[Piece, ...] = ()


MEDIA = {"images": "image", "audio": "audio", "video": "video"}
"""Key of PromptConfig -> type of a message's part."""


@dataclass(frozen=True)
class PromptConfig:
    """What to answer: exactly one of text, file and chat. Each text is one user message, or with `raw` a text to continue."""

    NEEDS: ClassVar = ("text or file or chat",)

    text: str | None = option(None, "one user message")
    file: str | None = option(None, "a text file, one user message per line")
    chat: str | None = option(None, 'a JSONL file of {"messages": [...], "tools": [...]}')
    images: tuple[str, ...] = option((), "picture files, shown before each text")
    audio: tuple[str, ...] = option((), "sound files, heard before each text")
    video: tuple[str, ...] = option((), "video files, shown before each text")
    raw: bool = option(False, "continue the text as it is, after BOS, instead of answering it as a user message")
    system: str | None = option(None, "system message before the texts")
    tools: str | None = option(None, "a JSON file with a list of function tools for the texts")
    output: str | None = option(None, "JSONL file for the answers")

    def __post_init__(self) -> None:
        given = [name for name in ("text", "file", "chat") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"prompts wants exactly one of text, file and chat, got {' and '.join(given) or 'none'}.")
        framed = [name for name in ("system", "tools", *MEDIA) if getattr(self, name)]
        if framed and (self.raw or self.chat is not None):
            what = "prompts.raw continues bare text" if self.raw else "the rows of prompts.chat have their own"
            raise UserError(f"prompts.{framed[0]} has no place: {what}.")
        if self.raw and self.chat is not None:
            raise UserError("prompts.raw is for text and file; the rows of prompts.chat are conversations.")


def read_prompts(config: PromptConfig) -> list[Prompt]:
    """The prompts a config names, in the order of the file. Raises UserError."""
    if config.chat is not None:
        return [conversation(row) for row in FileRows([config.chat])]
    texts = (
        [config.text]
        if config.file is None
        else [row.data.decode("utf-8", "replace") for row in FileRows([config.file])]
    )
    if config.raw:
        return [text for text in texts if text is not None]
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    tools = None if config.tools is None else _tools(config.tools)
    media = [{"type": kind, "path": path} for name, kind in MEDIA.items() for path in getattr(config, name)]
    contents = [[*media, {"type": "text", "text": text}] if media else text for text in texts]
    return [{"messages": [*system, {"role": "user", "content": content}], "tools": tools} for content in contents]


def conversation(row: Row) -> dict[str, Any]:
    """The object of a JSONL chat row, "messages" among its keys; what is inside is checked when it is rendered."""
    try:
        content = json.loads(row.data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row.where} is not JSON ({error}).") from None
    if not isinstance(content, dict) or "messages" not in content:
        raise UserError(f'{row.where} must be an object with the key "messages".')
    return content


def encode_prompt(prompt: Prompt, processor: Processor | None, vocab_size: int, enable_thinking: bool) -> EncodedPrompt:
    """The ids of one prompt. Raises UserError for a prompt that is empty, or of no known kind."""
    if isinstance(prompt, str):
        tokenizer = _need(processor, "text").tokenizer
        if not prompt:
            raise UserError("it is empty; give at least one character.")
        ids = tokenizer.encode(prompt)
        return EncodedPrompt(ids if ids[0] == tokenizer.special.bos else [tokenizer.special.bos, *ids], chat=False)
    if isinstance(prompt, Mapping) and "messages" in prompt:
        return _encode_chat(prompt["messages"], prompt.get("tools"), processor, enable_thinking)
    if isinstance(prompt, Mapping):
        keys = ", ".join(map(str, prompt)) or "none"
        raise UserError(
            f'a mapping must have the key "messages", got the keys {keys}; a conversation is a list of messages, so '
            "prompts is a list of such lists."
        )
    if not isinstance(prompt, Sequence | np.ndarray):
        raise UserError(f"it is text, a conversation or a list of token ids, got {type(prompt).__name__}.")
    if len(prompt) == 0:
        raise UserError("it is empty; give at least one token or message.")
    if all(isinstance(item, Mapping) for item in prompt):
        return _encode_chat(prompt, None, processor, enable_thinking)
    if not all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in prompt):
        raise UserError("a list must hold token ids (integers) or messages (mappings) only.")
    ids = [int(item) for item in prompt]
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UserError(f"token ids run from 0 to {vocab_size - 1}, got {wrong}.")
    return EncodedPrompt(ids, chat=False)


def _encode_chat(messages: Any, tools: Any, processor: Processor | None, enable_thinking: bool) -> EncodedPrompt:
    example = _need(processor, "conversations").encode(
        messages, tools or None, enable_thinking=enable_thinking, add_generation_prompt=True
    )
    return EncodedPrompt(example.tokens.tolist(), chat=True, media=example.media or ())


def _need(processor: Processor | None, what: str) -> Processor:
    if processor is None:
        raise UserError(
            f"{what} needs a processor, which this Sampler was made without; give token ids, or a processor."
        )
    return processor


def _tools(path: str) -> list[Any]:
    rows = FileRows([path], "file")
    try:
        tools = json.loads(rows[0].data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The tools file {path} is not JSON ({error}).") from None
    if not isinstance(tools, list):
        raise UserError(f"The tools file {path} must hold a list of function tools, got {type(tools).__name__}.")
    return tools

"""A conversation becomes arrays: tokens, positions and the mask of what is trained. The tokenizer and the chat format in one.

The text is tokenised whole and the mask read off character offsets, so the tokens are those of the rendered string whatever
lies at the borders of what is trained.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax import chat, chat_parse
from gemma4_jax.chat_check import ChatError, check_trainable
from gemma4_jax.errors import UserError
from gemma4_jax.tokenizer import CHAT, Tokenizer


@dataclass(frozen=True)
class Example:
    """One tokenised text.

    Attributes:
        tokens: int32 [T].
        positions: int32 [T], 0 to T-1.
        loss_mask: bool [T], True where the token is one the model learns to write.
        media: arrays of images, audio and video; None for text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    media: Any = None


class Processor:
    """Tokenizer plus chat format of one checkpoint.

    Attributes:
        tokenizer: the Tokenizer.
        empty_thought: whether the generation prompt without thinking has an empty thought channel (26B, 31B: yes; E2B, E4B: no).
    """

    def __init__(self, tokenizer: Tokenizer, *, empty_thought: bool = True) -> None:
        self.tokenizer = tokenizer
        self.empty_thought = empty_thought

    @classmethod
    def load(cls, path: str | Path, *, empty_thought: bool | None = None) -> "Processor":
        """From a checkpoint directory or a tokenizer file.

        `empty_thought=None` asks the directory: its chat_template.jinja, else its config.json, else as 31B has it.
        """
        tokenizer = Tokenizer.load(path)
        if empty_thought is None:
            empty_thought = _empty_thought_of(Path(path))
        return cls(tokenizer, empty_thought=empty_thought)

    def save(self, directory: str | Path) -> Path:
        """Writes the tokenizer file into a checkpoint directory; returns its path."""
        return self.tokenizer.save(directory)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stop_ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation as the published template gives it (see `chat.render`)."""
        return chat.render(
            messages,
            tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            empty_thought=self.empty_thought,
        )

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
        add_generation_prompt: bool = False,
        train_on: str = "assistant",
    ) -> Example:
        """A conversation as arrays.

        With `add_generation_prompt` it is a prompt: the published template's text. Without, it is for training: the last
        model turn stands as it would be generated, so the tokens of its prompt are a prefix of these tokens.

        Raises:
            ChatError: the conversation cannot be rendered, has media, or (for training) no assistant message.
            UserError: the tokenizer lacks chat pieces.
        """
        self.tokenizer.require(CHAT, "The chat format")
        spans = chat.render_spans(
            messages,
            tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            empty_thought=self.empty_thought,
            as_generated=not add_generation_prompt,
            train_on=train_on,
        )
        if not add_generation_prompt:
            check_trainable(messages)
        _check_no_media(messages)
        tokens, mask = self.encode_spans(spans)
        if np.count_nonzero(tokens == self.tokenizer.special.bos) != 1:
            raise ChatError(
                "<bos> inside the text", "A message contains the string <bos>, which may stand only at the start."
            )
        return Example(tokens, np.arange(tokens.size, dtype=np.int32), mask)

    def encode_spans(self, spans: Sequence[chat.Span]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [T], trained bool [T]) of the joined text; a token is trained if any of its characters is."""
        text = "".join(span.text for span in spans)
        trained = np.repeat([span.trained for span in spans], [len(span.text) for span in spans])
        ids, offsets = self.tokenizer.encode_offsets(text)
        bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
        stops = np.maximum(bounds[:, 1], bounds[:, 0] + 1)  # an early byte of a character has an empty range at it
        before = np.concatenate([[0], np.cumsum(trained)])
        return np.asarray(ids, np.int32), before[stops] > before[bounds[:, 0]]

    def encode_text(self, text: str, *, add_bos: bool = True, add_eos: bool = True) -> Example:
        """Plain text as arrays, every token but BOS trained. Without BOS Gemma 4 loses several nats a token."""
        tokens = np.asarray(self.tokenizer.encode(text, add_bos, add_eos), np.int32)
        mask = np.ones(tokens.size, bool)
        if add_bos:
            mask[0] = False
        return Example(tokens, np.arange(tokens.size, dtype=np.int32), mask)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`, special tokens as their strings or left out."""
        return self.tokenizer.decode(ids, skip_special)

    def parse(self, ids: Iterable[int]) -> chat_parse.Parsed:
        """Thought, tool calls and answer of generated ids."""
        return chat_parse.parse(ids, self.tokenizer)

    def stream_parser(self) -> chat_parse.StreamParser:
        """A parser of ids as they are generated: `feed` them, get events."""
        return chat_parse.StreamParser(self.tokenizer)


def _check_no_media(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ChatError for an image, audio or video part."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") in ("image", "audio", "video"):
                kind = part["type"]
                text = (
                    f"messages[{index}] has {kind} content; this version renders its placeholder but encodes text only."
                )
                raise ChatError(f"{kind} content", text)


def _empty_thought_of(path: Path) -> bool:
    """What a checkpoint directory says about the empty thought channel; True where it says nothing, as in 31B's template."""
    directory = path if path.is_dir() else path.parent
    template = directory / "chat_template.jinja"
    if template.is_file():
        return chat.EMPTY_THOUGHT.replace("\n", "\\n") in template.read_text(encoding="utf-8")
    config = directory / "config.json"
    if not config.is_file():
        return True
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON ({error}).") from None
    text = content.get("text_config", content) if isinstance(content, dict) else {}
    return not text.get("hidden_size_per_layer_input")  # only E2B and E4B have per-layer embeddings

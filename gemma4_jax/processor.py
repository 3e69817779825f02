"""A conversation becomes arrays: tokens, positions, the mask of what is trained, media: tokenizer, chat format, front end in one.

The text is tokenised whole and the mask read off character offsets, so the tokens are those of the rendered string whatever
lies at the borders of what is trained.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax import chat, chat_media, chat_parse, config_media
from gemma4_jax.chat_check import ChatError, check_trainable
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.media.frontend import FrontEnd, MediaConfig
from gemma4_jax.media.pieces import Piece
from gemma4_jax.tokenizer import CHAT, Tokenizer


@dataclass(frozen=True)
class Example:
    """One tokenised text.

    Attributes:
        tokens: int32 [T].
        positions: int32 [T], 0 to T-1.
        loss_mask: bool [T], True where the token is one the model learns to write.
        media: pictures, frames and sounds in the order of their soft tokens; `media.batch.batch_media` makes a batch of them. None
            for text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    media: tuple[Piece, ...] | None = None


class Processor:
    """Tokenizer, chat format and media front end of one checkpoint.

    Attributes:
        tokenizer: the Tokenizer.
        empty_thought: whether the generation prompt without thinking has an empty thought channel (26B, 31B: yes; E2B, E4B: no).
        front_end: the model's eyes and ears, and how media are read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        empty_thought: bool = True,
        front_end: FrontEnd = FrontEnd(),  # noqa: B008
    ) -> None:
        self.tokenizer = tokenizer
        self.empty_thought = empty_thought
        self.front_end = front_end

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        empty_thought: bool | None = None,
        media: MediaConfig = MediaConfig(),  # noqa: B008
    ) -> "Processor":
        """From a checkpoint directory or a tokenizer file.

        `empty_thought=None` asks the directory: its chat_template.jinja, else its config.json or the checkpoints of our run,
        else as 31B has it. The latter two say what the model sees and hears as well; a tokenizer alone encodes text only.
        """
        tokenizer = Tokenizer.load(path)
        if empty_thought is None:
            empty_thought = _empty_thought_of(Path(path))
        return cls(tokenizer, empty_thought=empty_thought, front_end=FrontEnd(**_towers_of(Path(path)), config=media))

    def with_front_end(self, front_end: FrontEnd) -> "Processor":
        """The same tokenizer and chat format with other eyes and ears, or reading media in another way."""
        return Processor(self.tokenizer, empty_thought=self.empty_thought, front_end=front_end)

    def below(self, directory: str | Path) -> "Processor":
        """The same, reading media below a directory and nowhere else, unless it has a media root already."""
        config = self.front_end.config
        if config.root is not None:
            return self
        config = dataclasses.replace(config, root=str(directory))
        return self.with_front_end(dataclasses.replace(self.front_end, config=config))

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
            ChatError: the conversation cannot be rendered, has media that cannot be used, or (for training) no assistant message.
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
        spans, pieces = chat_media.expanded(spans, messages, self.front_end.expand)
        if pieces:
            self.tokenizer.require([name for piece in pieces for name in _PIECES[piece.kind]], "Media")
        tokens, mask = self.encode_spans(spans)
        if np.count_nonzero(tokens == self.tokenizer.special.bos) != 1:
            raise ChatError(
                "<bos> inside the text", "A message contains the string <bos>, which may stand only at the start."
            )
        placed = self._placed(tokens, pieces)
        for piece in placed:  # a model writes no pictures, whoever has sent them
            mask[piece.start - 1 : piece.start + piece.count + 1] = False
        return Example(tokens, np.arange(tokens.size, dtype=np.int32), mask, placed or None)

    def _placed(self, tokens: np.ndarray, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """The pieces where their soft tokens stand, which are runs of placeholders in the same order."""
        special = self.tokenizer.special
        known = [index for index in (special.image, special.audio, special.video) if index is not None]
        here = np.flatnonzero(np.isin(tokens, known))
        placed, at = [], 0
        for piece in pieces:
            run = tokens[here[at : at + piece.count]]
            assert run.size == piece.count, f"{piece.count} soft tokens, {run.size} placeholders"
            assert (run == getattr(special, piece.kind)).all(), f"no placeholders of {piece.kind}"
            placed.append(piece.at(int(here[at])))
            at += piece.count
        return tuple(placed)

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


_PIECES = {
    "image": ("image_open", "image", "image_close"),
    "video": ("image_open", "video", "image_close"),
    "audio": ("audio_open", "audio", "audio_close"),
}
"""Special pieces that a tokenizer needs for each kind of medium."""


def _towers_of(path: Path) -> dict[str, Any]:
    """The fields `vision` and `audio` of FrontEnd that stand in a checkpoint directory's config.json."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        cfg = _trained_here(config.parent)
        return {} if cfg is None else {"vision": cfg.vision, "audio": cfg.audio}
    content = _json(config)
    return config_media.from_hf(content) if content.get("model_type") == "gemma4" else {}


def _empty_thought_of(path: Path) -> bool:
    """What a checkpoint directory says about the empty thought channel; True where it says nothing, as in 31B's template.

    Of the published models only E2B and E4B have per-layer inputs, and no empty thought.
    """
    directory = path if path.is_dir() else path.parent
    template = directory / "chat_template.jinja"
    if template.is_file():
        return chat.EMPTY_THOUGHT.replace("\n", "\\n") in template.read_text(encoding="utf-8")
    config = directory / "config.json"
    if not config.is_file():
        cfg = _trained_here(directory)
        return cfg is None or not cfg.hidden_size_per_layer_input
    content = _json(config)
    return not content.get("text_config", content).get("hidden_size_per_layer_input")


def _trained_here(directory: Path) -> ModelConfig | None:
    """The model of a run's working directory, or of one of our model directories; None for any other place."""
    if not any((directory / name).is_dir() for name in ("checkpoints", "meta")) and not any(
        directory.glob("[0-9]*/meta")
    ):
        return None
    from gemma4_jax.checkpoint.load import load_config  # with Orbax, seconds: a tokenizer alone does not wait for it

    try:
        return load_config(directory)
    except UserError:  # no step is committed yet, or none can be read: `load` says so, a tokenizer need not
        return None


def _json(config: Path) -> dict[str, Any]:
    """The object in a config.json, or an empty one."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON ({error}).") from None
    return content if isinstance(content, dict) else {}

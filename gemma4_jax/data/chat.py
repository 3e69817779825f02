"""A row becomes tokens with a mask of what is trained, or one reason why it cannot.

Three kinds of rows: chats `{"messages": [...], "tools": [...]}`, question and answer fields that make a chat of two turns,
and text. What follows the last trained token is cut off: no later token can change a causal model's loss before it.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_jax.chat_check import ChatError
from gemma4_jax.data.source import Row
from gemma4_jax.errors import UserError
from gemma4_jax.media.pieces import Piece
from gemma4_jax.processor import Example, Processor

if TYPE_CHECKING:
    from gemma4_jax.data.pipeline import DataConfig


class BadRow(UserError):
    """A row that cannot be used. `reason` counts it, the message says where it is and what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """A row ready for packing: `tokens` int32 [n+1], and `trained` bool [n] for the targets tokens[1:].

    It takes n slots of a sequence: each of its tokens but the last is an input. `note` is a remark for the summary. `media`:
    pictures, frames and sounds among the inputs.
    """

    tokens: np.ndarray
    trained: np.ndarray
    note: str | None = None
    media: tuple[Piece, ...] = ()

    def __len__(self) -> int:
        return self.trained.size

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.trained.nbytes + sum(piece.nbytes for piece in self.media)

    def piece(self, number: int, seq_len: int) -> "Encoded":
        """Its targets [number * seq_len, (number + 1) * seq_len); a later piece starts with BOS again, as any text must."""
        start, stop = number * seq_len, min((number + 1) * seq_len, len(self))
        if number == 0:
            return self if stop == len(self) else Encoded(self.tokens[: stop + 1], self.trained[:stop])
        tokens = np.concatenate([self.tokens[:1], self.tokens[start + 1 : stop + 1]])
        return Encoded(tokens, self.trained[start:stop])


class RowEncoder:
    """Rows to `Encoded`, as a DataConfig says.

    Paths of media are relative to the processor's media root, or if it has none to the directory of the row's file; nothing
    outside of it is read.
    """

    def __init__(self, config: "DataConfig", processor: Processor) -> None:
        self._config = config
        self._processor = processor
        self._below = functools.lru_cache(processor.below)  # of each directory with rows

    def __call__(self, row: Row) -> Encoded:
        """Raises BadRow."""
        try:
            text = row.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"{row.where} is not UTF-8 (byte {error.start}).") from None
        try:
            example, note = self._text(text) if self._config.kind == "text" else self._chat(text, row.directory)
        except ChatError as error:
            raise BadRow(error.reason, f"{row.where}: {error}") from None
        except UserError as error:  # text that no tokenizer can take
            raise BadRow("cannot be tokenised", f"{row.where}: {error}") from None
        return self._fit(example, row, note)

    def _text(self, text: str) -> tuple[Example, str | None]:
        if self._config.text_is_json:
            text = _string(_object(text), self._config.text_field)
        return self._processor.encode_text(text), None

    def _chat(self, text: str, directory: Path) -> tuple[Example, str | None]:
        config, content, tools = self._config, _object(text), None
        if config.kind == "qa":
            turns = (("user", config.prompt_field), ("assistant", config.response_field))
            messages: Any = [{"role": role, "content": _string(content, field)} for role, field in turns]
        elif "messages" in content:
            messages, tools = content["messages"], content.get("tools") or None
        else:
            raise ChatError("no messages", f"the row has no key 'messages' (its keys: {_keys(content)}).")
        example = self._below(directory).encode(
            messages, tools, enable_thinking=config.enable_thinking, train_on=config.train_on
        )
        return example, _note(messages, config.enable_thinking)

    def _fit(self, example: Example, row: Row, note: str | None) -> Encoded:
        """Cuts the untrained tail, and refuses what does not fit."""
        trained = np.flatnonzero(example.loss_mask[1:])
        if not trained.size:
            raise BadRow("nothing to train on", f"{row.where} has no token to train on.")
        stop = int(trained[-1]) + 1
        splits = self._config.kind == "text" and self._config.split_long
        if stop > self._config.seq_len and not splits:
            text = f"{row.where} needs {stop} tokens, more than seq_len {self._config.seq_len}."
            raise BadRow("longer than the sequence", text)
        media = tuple(piece for piece in example.media or () if piece.start + piece.count <= stop)
        return Encoded(example.tokens[: stop + 1], example.loss_mask[1 : stop + 1], note, media)


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a line. Raises ChatError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ChatError("not JSON", f"not JSON ({error}).") from None
    except RecursionError:
        raise ChatError("not JSON", "not JSON that can be read (nested too deeply).") from None
    if not isinstance(content, dict):
        raise ChatError("not an object", f"the row must be a JSON object, got {type(content).__name__}.")
    return content


def _string(content: dict[str, Any], field: str) -> str:
    """A non-blank string field. Raises ChatError."""
    text = content.get(field)
    if not isinstance(text, str):
        raise ChatError(f"no {field}", f"the row has no string under {field!r} (its keys: {_keys(content)}).")
    if not text.strip():
        raise ChatError(f"blank {field}", f"the string under {field!r} is blank.")
    return text


def _keys(content: dict[str, Any]) -> str:
    return ", ".join(list(content)[:8]) or "none"


def _note(messages: list[dict[str, Any]], thinking: bool) -> str | None:
    """A remark on thoughts that the chat format will not write."""
    for message in messages:
        thought = message.get("reasoning") or message.get("reasoning_content")
        if thought and not thinking and not message.get("tool_calls"):
            return "with a thought left out (set enable_thinking to train on it)"
    return None

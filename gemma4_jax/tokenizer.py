"""Text becomes ids exactly as in Gemma 4, from a SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`.

A special string in the text (`<bos>`, `<|turn>`, `<|"|>`, ...) becomes its one id; nothing is added that the text does
not say, so BOS comes from the chat format or from `add_bos=True`. Ids are looked up by piece name, never assumed: a small
tokenizer may number them otherwise or lack some of them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from gemma4_jax.errors import UserError

FILE_NAMES = ("tokenizer.model", "tokenizer.json")  # in order of preference inside a directory

# Field of SpecialIds -> piece. The first four every tokenizer must have.
SPECIAL_PIECES = {
    "pad": "<pad>",
    "eos": "<eos>",
    "bos": "<bos>",
    "unk": "<unk>",
    "think": "<|think|>",
    "turn_open": "<|turn>",
    "turn_close": "<turn|>",
    "channel_open": "<|channel>",
    "channel_close": "<channel|>",
    "tool_open": "<|tool>",
    "tool_close": "<tool|>",
    "tool_call_open": "<|tool_call>",
    "tool_call_close": "<tool_call|>",
    "tool_response_open": "<|tool_response>",
    "tool_response_close": "<tool_response|>",
    "quote": '<|"|>',
    "newline": "\n",
    "image_open": "<|image>",
    "image": "<|image|>",
    "image_close": "<image|>",
    "audio_open": "<|audio>",
    "audio": "<|audio|>",
    "audio_close": "<audio|>",
    "video": "<|video|>",
}
CORE = ("pad", "eos", "bos", "unk")
CHAT = tuple(name for name in SPECIAL_PIECES if name not in CORE and not name.startswith(("image", "audio", "video")))

# Gemma 4's SentencePiece model was published before the video placeholder got its name; tokenizer.json has the name.
VIDEO_ALIAS = ("<|video|>", "<unused2968>")


@dataclass(frozen=True)
class SpecialIds:
    """The id of every special piece, None where this tokenizer has no such piece. `image` etc. are the placeholders."""

    pad: int
    eos: int
    bos: int
    unk: int
    think: int | None
    turn_open: int | None
    turn_close: int | None
    channel_open: int | None
    channel_close: int | None
    tool_open: int | None
    tool_close: int | None
    tool_call_open: int | None
    tool_call_close: int | None
    tool_response_open: int | None
    tool_response_close: int | None
    quote: int | None
    newline: int | None
    image_open: int | None
    image: int | None
    image_close: int | None
    audio_open: int | None
    audio: int | None
    audio_close: int | None
    video: int | None


class Backend(Protocol):
    """What one tokenizer library does for plain text: text in which no special string has been left to find."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece_of(self, index: int) -> str: ...
    def id_of(self, piece: str) -> int | None: ...


class SentencePieceBackend:
    """The `sentencepiece` library over a serialised model."""

    def __init__(self, data: bytes) -> None:
        import sentencepiece  # here, because a tokenizer.json needs only the other library

        self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.size: int = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        mapping = self._model.encode(text, return_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece_of(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def id_of(self, piece: str) -> int | None:
        index = self._model.piece_to_id(piece)  # unknown pieces give the id of <unk>
        return index if self._model.id_to_piece(index) == piece else None


class JsonBackend:
    """The `tokenizers` library over the text of a tokenizer.json."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        self._model: Any = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        self.size: int = self._model.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def piece_of(self, index: int) -> str:
        return self._model.id_to_token(index)

    def id_of(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.load`; it holds the file's bytes, so it pickles and `save`s anywhere.

    Attributes:
        special: ids of the special pieces.
        vocab_size: number of pieces; ids run from 0 to vocab_size - 1.
        stop_ids: ids that end generation: `<eos>`, `<turn|>`, `<|tool_response>` (those that exist).
    """

    def __init__(self, data: bytes, file_name: str) -> None:
        """`data` is the whole file; `file_name` one of FILE_NAMES. `load` reads it and words the errors."""
        self._data = data
        self._file_name = file_name
        self._backend: Backend = JsonBackend(data) if file_name.endswith(".json") else SentencePieceBackend(data)
        self.vocab_size: int = self._backend.size
        found = {name: self._backend.id_of(piece) for name, piece in SPECIAL_PIECES.items()}
        placeholder, alias = VIDEO_ALIAS
        self._video_alias = found["video"] is None and (video := self._backend.id_of(alias)) is not None
        if self._video_alias:
            found["video"] = video
        missing = [SPECIAL_PIECES[name] for name in CORE if found[name] is None]
        if missing:
            raise UserError(
                f"A Gemma tokenizer has the pieces <pad> <eos> <bos> <unk>; this one lacks {' '.join(missing)}."
            )
        self.special = SpecialIds(**found)  # type: ignore[arg-type]  # the four core ids are present
        stops = (self.special.eos, self.special.turn_close, self.special.tool_response_open)
        self.stop_ids: tuple[int, ...] = tuple(index for index in stops if index is not None)
        # Control pieces are not matched inside text by SentencePiece, and the alias is under another name: both are cut
        # out before the library sees the text. All other special pieces the library finds itself.
        self._cut = {SPECIAL_PIECES[name]: getattr(self.special, name) for name in CORE}
        if self.special.video is not None and self._video_alias:
            self._cut[placeholder] = self.special.video
        self._cut_pattern = re.compile("|".join(re.escape(piece) for piece in self._cut))
        self._special_text = {
            index: SPECIAL_PIECES[field.name]
            for field in fields(SpecialIds)
            if (index := getattr(self.special, field.name)) is not None and field.name != "newline"
        }

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer file, the one in a directory (tokenizer.model before tokenizer.json), or that of a GGUF file.

        Raises:
            UserError: nothing there, or the file is not a tokenizer.
        """
        file = find_file(Path(path))
        if file.suffix == ".gguf":
            from gemma4_jax.checkpoint.gguf_tokenizer import json_of

            return cls(json_of(file), "tokenizer.json")
        kind = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
        library = "tokenizer.json" if kind == "tokenizer.json" else "SentencePiece model"
        data = file.read_bytes()
        if not data:
            raise UserError(f"The tokenizer file {file} is empty.")
        try:
            return cls(data, kind)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except Exception as error:  # each library has its own, and `tokenizers` raises bare Exception
            raise UserError(f"{file} is not a readable {library} ({first_line(error)}).") from None

    def save(self, directory: str | Path) -> Path:
        """Writes the file it was loaded from, byte for byte, as tokenizer.model or tokenizer.json; returns its path."""
        target = Path(directory) / self._file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self._data)
        return target

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._data, self._file_name)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of `text`; special strings in it become their ids. Raises UserError for text with a lone surrogate."""
        check_unicode(text)
        ids = [self.special.bos] if add_bos else []
        for part, index in self._parts(text):
            ids.extend(self._backend.encode(part) if index is None else [index])
        if add_eos:
            ids.append(self.special.eos)
        return ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same ids as `encode`, and for each its character range [start, end) in `text`.

        A character written as several byte pieces belongs to the last of them; the earlier ones have an empty range at it.
        """
        check_unicode(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part, index in self._parts(text):
            if index is None:
                part_ids, part_offsets = self._backend.encode_offsets(part)
                ids.extend(part_ids)
                offsets.extend((begin + start, end + start) for begin, end in part_offsets)
            else:
                ids.append(index)
                offsets.append((start, start + len(part)))
            start += len(part)
        return ids, offsets

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. Special ids give their strings, or nothing with `skip_special`."""
        text: list[str] = []
        run: list[int] = []
        for index in (int(index) for index in ids):
            if not 0 <= index < self.vocab_size:
                raise UserError(f"Ids run from 0 to {self.vocab_size - 1}, got {index}.")
            special = self._special_text.get(index)
            if special is None:
                run.append(index)
                continue
            if run:
                text.append(self._backend.decode(run))
                run = []
            if not skip_special:
                text.append(special)
        if run:
            text.append(self._backend.decode(run))
        return "".join(text)

    def id_of(self, piece: str) -> int:
        """The id of a piece. Raises UserError when there is none."""
        index = self._cut.get(piece, self._backend.id_of(piece))
        if index is None:
            raise UserError(f"This tokenizer of {self.vocab_size} pieces has no piece {piece!r}.")
        return index

    def piece_of(self, index: int) -> str:
        """The piece of an id: special string, `▁` for a space, `<0x0A>` for a byte."""
        if not 0 <= index < self.vocab_size:
            raise UserError(f"Ids run from 0 to {self.vocab_size - 1}, got {index}.")
        return self._special_text.get(index) or self._backend.piece_of(index)

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Raises UserError naming the pieces among the SpecialIds fields `names` that are missing for `purpose`."""
        missing = [SPECIAL_PIECES[name] for name in names if getattr(self.special, name) is None]
        if missing:
            pieces = ", ".join(repr(piece) for piece in missing)
            raise UserError(
                f"{purpose} needs the special pieces {pieces}, which this tokenizer of {self.vocab_size} pieces lacks; "
                "use a tokenizer made for Gemma 4."
            )

    def _parts(self, text: str) -> Iterable[tuple[str, int | None]]:
        """Cuts `text` at the strings of `_cut`: (string, its id) and (plain text, None), in order."""
        start = 0
        for match in self._cut_pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()], None
            yield match.group(), self._cut[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:], None


def find_file(path: Path) -> Path:
    """The tokenizer file at `path` or in the directory `path`. Raises UserError when there is none."""
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"The directory {path} has neither {' nor '.join(FILE_NAMES)}; copy one of them there.")
    if not path.is_file():
        raise UserError(f"There is no tokenizer at {path}; give a .model or .json file, or a directory with one.")
    return path


def check_unicode(text: str) -> None:
    """Raises UserError for a lone surrogate, which has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text has a lone surrogate at character {error.start}, which no tokenizer can encode."
        ) from None


def first_line(error: Exception) -> str:
    """What an exception says, in one line of at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")

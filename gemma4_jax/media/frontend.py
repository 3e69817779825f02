"""A part of a message, `{"type": "image" | "audio" | "video", ...}`, as text with placeholders and the pieces behind them.

What a part holds: exactly one of `path`, `bytes`, `array`, or the object itself under the name of its type
(`{"type": "image", "image": pillow_image}`), and

    image   max_soft_tokens
    audio   sampling_rate (of an array; 16000 if not given)
    video   max_soft_tokens (of a frame), num_frames, fps (of an array), listen (false: leave the sound track out)
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.config_media import AudioConfig, VisionConfig
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.media.files import MediaError
from gemma4_jax.media.images import check_budget, image_piece, patches_of
from gemma4_jax.media.pieces import Piece, SoundPiece
from gemma4_jax.media.sounds import RATE, log_mel, sound_piece, waveform
from gemma4_jax.media.videos import film_of, timestamp
from gemma4_jax.options import option

OPTIONS = {
    "image": {"max_soft_tokens"},
    "audio": {"sampling_rate"},
    "video": {"max_soft_tokens", "num_frames", "fps", "listen"},
}
SOURCES = ("path", "bytes", "array")
OF_ARRAYS = ("sampling_rate", "fps")
"""Options that say of an array what a file says itself."""


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """How pictures, videos and sounds are read."""

    root: str | None = option(
        None,
        "directory that media paths are relative to; nothing outside it is read; none: of rows that of their file, else any path",
    )
    image_tokens: int = option(280, "most soft tokens of a picture: 70, 140, 280, 560 or 1120")
    frame_tokens: int = option(70, "most soft tokens of a video frame: 70, 140, 280, 560 or 1120")
    num_frames: int = option(32, "frames of a video, at even distances")
    listen: bool = option(True, "hear the sound track of videos, where the model has ears")

    def __post_init__(self) -> None:
        check_budget(self.image_tokens, "media.image_tokens")
        check_budget(self.frame_tokens, "media.frame_tokens")
        if self.num_frames < 1:
            raise UserError(f"media.num_frames is at least 1, got {self.num_frames}.")


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """The eyes and ears of one model, and how they are used."""

    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    config: MediaConfig = MediaConfig()

    def expand(self, part: Mapping[str, Any], where: str) -> tuple[str, list[Piece]]:
        """The text that stands for a part, and its pieces in the order of their placeholders.

        Raises:
          MediaError: anything wrong with the part, in one sentence that begins with `where`.
        """
        kind = part["type"]
        source = _source(part, kind, where)
        if kind == "audio":
            return self._audio(part, source, where)
        if self.vision is None:
            text = (
                f"{where} is {'an image' if kind == 'image' else 'a video'}, but this processor knows no vision tower; "
            )
            text += "load it from a checkpoint directory whose config.json has vision_config."
            raise MediaError(f"{kind} for a model without eyes", text)
        return self._image(part, source, where) if kind == "image" else self._video(part, source, where)

    @property
    def _root(self) -> Path | None:
        return None if self.config.root is None else Path(self.config.root)

    def _audio(self, part: Mapping[str, Any], source: Any, where: str) -> tuple[str, list[Piece]]:
        if self.audio is None:
            text = f"{where} is audio, but this model has no ears: only E2B and E4B hear."
            raise MediaError("audio for a model without ears", text)
        if part.get("sampling_rate") is not None:
            source = (source, part["sampling_rate"])
        piece = sound_piece(source, self._root, where)
        return heard(piece.count), [piece]

    def _image(self, part: Mapping[str, Any], source: Any, where: str) -> tuple[str, list[Piece]]:
        assert self.vision is not None
        budget = _budget(part, self.config.image_tokens, where)
        piece = image_piece(source, self.vision, budget, self._root, where)
        return seen(piece.count), [piece]

    def _video(self, part: Mapping[str, Any], source: Any, where: str) -> tuple[str, list[Piece]]:
        assert self.vision is not None
        budget = _budget(part, self.config.frame_tokens, where)
        wanted = part.get("num_frames", self.config.num_frames)
        if not isinstance(wanted, int) or wanted < 1:
            raise MediaError("video option", f"{where}: num_frames is a whole number of at least 1, got {wanted!r}.")
        listen = self.audio is not None and self.config.listen and part.get("listen", True)
        film = film_of(source, wanted, fps=part.get("fps"), listen=listen, root=self._root, where=where)
        frames = [patches_of(frame, self.vision, budget, "video") for frame in film.frames]
        times = [
            f"{timestamp(at)} {seen(frame.count, 'video')}" for at, frame in zip(film.seconds, frames, strict=True)
        ]
        pieces: list[Piece] = [*frames]
        if film.sound is not None:
            sound = SoundPiece(log_mel(waveform((film.sound, RATE), where=where)))
            pieces.append(sound)
            times.append(heard(sound.count))
        return " ".join(times), pieces


def seen(count: int, kind: str = "image") -> str:
    """The text of a picture or a frame."""
    return f"<|image>{f'<|{kind}|>' * count}<image|>"


def heard(count: int) -> str:
    """The text of a sound."""
    return f"<|audio>{'<|audio|>' * count}<audio|>"


def _source(part: Mapping[str, Any], kind: str, where: str) -> Any:
    """The one thing a part is made of."""
    given = [key for key in (*SOURCES, kind) if part.get(key) is not None]
    unknown = [key for key in part if key not in {"type", *SOURCES, kind, *OPTIONS[kind]}]
    if "url" in unknown:
        raise MediaError("media URL", f"{where} has a url; download it and give the path of the file.")
    if unknown:
        hint = did_you_mean(str(unknown[0]), sorted({*SOURCES, kind, *OPTIONS[kind]}))
        raise MediaError("unknown media option", f"{where} has {unknown[0]!r}, which no {kind} has; {hint}")
    if len(given) != 1:
        text = f"{where} wants exactly one of {', '.join((*SOURCES, kind))}, got {' and '.join(given) or 'none'}."
        raise MediaError("media without a source", text)
    source = part[given[0]]
    raw = isinstance(source, bytes | bytearray | memoryview)
    if given[0] == "bytes" and not raw:
        text = (
            f"{where}: bytes must be bytes, got {type(source).__name__}; JSON has none: write a file and give its path."
        )
        raise MediaError("media without a source", text)
    told = [name for name in OF_ARRAYS if part.get(name) is not None]
    if told and (raw or isinstance(source, str | Path)):
        instead = "; num_frames is how many are looked at" if told[0] == "fps" else ""
        raise MediaError(
            "option of arrays", f"{where} is a file, which has its own {told[0]}; leave {told[0]} out{instead}."
        )
    return source


def _budget(part: Mapping[str, Any], default: int, where: str) -> int:
    budget = part.get("max_soft_tokens", default)
    try:
        check_budget(budget, f"{where}: max_soft_tokens")
    except UserError as error:
        raise MediaError("soft token budget", str(error)) from None
    return budget

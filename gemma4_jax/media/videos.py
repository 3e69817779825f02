"""Videos: frames at even distances with the seconds they were taken at, and the sound track.

Which frames: transformers 5.23, `BaseVideoProcessor.sample_frames` (index = floor(i * frames / wanted)); what they become:
pictures with a smaller budget each.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.media.files import MediaError, library, name_of, opened
from gemma4_jax.media.images import MOST_PIXELS, pixels_of
from gemma4_jax.media.sounds import LONGEST, RATE

ASSUMED_FPS = 24.0
MOST_FRAMES = 1_000_000
"""Frames of a video that is read at all."""


@dataclass(frozen=True)
class Film:
    """Chosen frames, uint8 [H, W, 3] each; the second each was taken at; the sound at 16 kHz, or None."""

    frames: list[np.ndarray]
    seconds: list[float]
    sound: np.ndarray | None


def film_of(
    source: Any,
    wanted: int,
    *,
    fps: float | None = None,
    listen: bool = False,
    root: Path | None = None,
    where: str = "The video",
) -> Film:
    """At most `wanted` frames of a path, bytes, an array [F, H, W, 3] or a sequence of pictures.

    `fps` is for arrays and pictures, 24 if none; files know theirs. `listen` also reads the sound track of a file.

    Raises:
      MediaError: anything wrong with it, in one sentence that begins with `where`.
    """
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        return _decoded(opened(source, root, where), wanted, listen, where)
    if not isinstance(source, np.ndarray | Sequence):
        kind = type(source).__name__
        raise MediaError("not a video", f"{where} must be a path, bytes, an array or a list of pictures, got {kind}.")
    if isinstance(source, np.ndarray) and source.ndim != 4:
        text = f"{where}: an array must be [frames, height, width, 3], got {list(source.shape)}."
        raise MediaError("not a video", text)
    rate = ASSUMED_FPS if fps is None else fps
    if not isinstance(rate, int | float) or not 0 < rate <= 1000:
        raise MediaError("frame rate", f"{where}: fps is a number above 0 and at most 1000, got {fps!r}.")
    chosen = frame_indices(_check_count(len(source), where), wanted)
    frames = [pixels_of(source[i], root, f"{where}, frame {i}") for i in chosen]
    return Film(frames, [i / rate for i in chosen], None)


def frame_indices(total: int, wanted: int) -> list[int]:
    """Which of `total` frames are looked at: all, or `wanted` at even distances from the first."""
    if total <= wanted:
        return list(range(total))
    return [int(np.float32(i) * np.float32(total / wanted)) for i in range(wanted)]


def timestamp(seconds: float) -> str:
    """`mm:ss`, rounded down."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def sound_track(file: Path | io.BytesIO, where: str = "The video") -> np.ndarray | None:
    """float32 samples at 16 kHz of a container's first audio stream, at most 30 s and a bit; None without one."""
    with _container(file, where) as container:
        if not container.streams.audio:
            return None
        resampler = library("av", "Reading audio").AudioResampler(format="flt", layout="mono", rate=RATE)
        found, count = [], 0
        for frame in container.decode(container.streams.audio[0]):
            for piece in resampler.resample(frame):
                found.append(piece.to_ndarray().reshape(-1))
                count += found[-1].size
            if count > LONGEST:
                break
        return np.concatenate(found) if found else None


def _decoded(file: Path | io.BytesIO, wanted: int, listen: bool, where: str) -> Film:
    with _container(file, where) as container:
        if not container.streams.video:
            raise MediaError("video without frames", f"{where}: {name_of(file)} has no video stream.")
        stream = container.streams.video[0]
        _check_pixels(stream, where, name_of(file))
        total, rate = stream.frames, float(stream.average_rate or ASSUMED_FPS)
        if not total:  # not every container says; then it is counted
            total = _check_count(sum(1 for _ in _limited(container.decode(stream), where)), where)
            container.seek(0)
        chosen = frame_indices(_check_count(total, where), wanted)
        frames = {}
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                frames[index] = frame.to_ndarray(format="rgb24")
            if index >= chosen[-1]:
                break
    if not frames:
        raise MediaError("video without frames", f"{where}: no frame of {name_of(file)} can be decoded.")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return Film(list(frames.values()), [i / rate for i in frames], sound_track(file, where) if listen else None)


@contextlib.contextmanager
def _container(file: Path | io.BytesIO, where: str) -> Iterator[Any]:
    av = library("av", "Reading videos")
    try:
        with av.open(str(file) if isinstance(file, Path) else file) as container:
            yield container
    except MediaError:  # a ValueError too, which says all
        raise
    except (av.FFmpegError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise MediaError("not a video", f"{where}: {name_of(file)} cannot be decoded ({reason}).") from None


def _limited(frames: Iterator[Any], where: str) -> Iterator[Any]:
    for index, frame in enumerate(frames):
        _check_count(index + 1, where)
        yield frame


def _check_count(total: int, where: str) -> int:
    if not total:
        raise MediaError("video without frames", f"{where} has no frames.")
    if total > MOST_FRAMES:
        raise MediaError("video too long", f"{where} has {total} frames; at most {MOST_FRAMES} are read.")
    return total


def _check_pixels(stream: Any, where: str, name: str) -> None:
    if stream.codec_context is None:
        raise MediaError("not a video", f"{where}: {name} holds frames of a kind that PyAV does not know.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MOST_PIXELS:
        text = f"{where}: {name} has frames of {width} x {height} pixels; at most {MOST_PIXELS} are read."
        raise MediaError("image too large", text)

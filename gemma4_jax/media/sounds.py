"""Sounds: from a file or an array to 16 kHz, and to the log-mel frames of the audio tower.

Frames of 320 samples every 160, periodic Hann window, magnitude (not power) of a 512-point FFT, 128 triangular HTK filters from 0
to 8000 Hz, ln(mel + 0.001). No mean, no deviation, no pre-emphasis. Source: transformers 5.23,
models/gemma4/feature_extraction_gemma4.py.
"""

import functools
import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.media.files import MediaError, library, name_of, opened
from gemma4_jax.media.pieces import SoundPiece

RATE = 16_000
LONGEST = 30 * RATE
FRAME, HOP, FFT, BINS = 320, 160, 512, 128
FLOOR = 1e-3
RATES = (1_000, 192_000)
"""Sample rates that are read."""

CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""What libsndfile notes of a WAV, AIFF or AU file whose header promises other samples than there are."""

UNKNOWN_SIZE = 2**31 - 2**16
"""Headers written before the sound ended promise this or more."""

log = logging.getLogger(__name__)


def sound_piece(source: Any, root: Path | None = None, where: str = "The audio") -> SoundPiece:
    """A sound as frames: a path, bytes, samples at 16 kHz, or (samples, rate); samples are [T] or [T, channels].

    What is longer than 30 s is cut there, and a log line says so.

    Raises:
      MediaError: anything wrong with it, in one sentence that begins with `where`.
    """
    return SoundPiece(log_mel(waveform(source, root, where)))


def waveform(source: Any, root: Path | None = None, where: str = "The audio") -> np.ndarray:
    """float32 [T] at 16 kHz, all channels mixed, at most 30 s, at least one frame."""
    samples, rate, more = _read(source, root, where)
    if not np.issubdtype(samples.dtype, np.floating):
        text = f"{where}: samples must be floats from -1 to 1, got {samples.dtype}; divide integers by their largest value."
        raise MediaError("samples are not floats", text)
    if samples.ndim not in (1, 2) or samples.size == 0:
        text = f"{where} has no samples; wanted [samples] or [samples, channels], got {list(samples.shape)}."
        raise MediaError("empty audio", text)
    if not np.isfinite(samples).all():
        raise MediaError("audio is not finite", f"{where} has samples that are not finite numbers.")
    mono = samples.astype(np.float32) if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)
    if rate != RATE:
        mono = library("soxr", f"Audio at {rate} Hz").resample(mono, rate, RATE).astype(np.float32)
    if more or len(mono) > LONGEST:
        log.warning("%s is longer than 30 s; only its first 30 s are heard.", where)
        mono = mono[:LONGEST]
    if len(mono) <= HOP:
        text = f"{where} lasts {1000 * len(mono) / RATE:.1f} ms; a frame needs more than {1000 * HOP // RATE} ms."
        raise MediaError("empty audio", text)
    return mono


def log_mel(samples: np.ndarray) -> np.ndarray:
    """float32 [F, 128] of float32 samples at 16 kHz: (n - 161) // 160 + 1 frames, each wholly inside the sound.

    160 zeros stand before the first sample. In the dtypes of the reference: a float64 FFT would differ by more than 1e-4 in
    quiet bins beside loud ones.
    """
    padded = np.pad(samples.astype(np.float32), (FRAME // 2, 0))
    count = (len(padded) - FRAME - 1) // HOP + 1
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP][:count]
    magnitude = np.abs(np.fft.rfft(frames * _window(), n=FFT, axis=-1))
    return np.log(magnitude @ _filters() + FLOOR).astype(np.float32)


@functools.cache
def _window() -> np.ndarray:
    """The periodic Hann window, float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)


@functools.cache
def _filters() -> np.ndarray:
    """float64 [257, 128]: triangles between points that are even on the mel scale, of height 1.

    The first and the narrowest may contain no FFT frequency and be 0.
    """
    mel = np.linspace(_mel(0.0), _mel(RATE / 2), BINS + 2)
    points = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    frequencies = np.linspace(0, RATE // 2, FFT // 2 + 1)
    slopes = points[None] - frequencies[:, None]
    widths = np.diff(points)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def _mel(frequency: float) -> float:
    """HTK's mel scale."""
    return 2595.0 * np.log10(1.0 + frequency / 700.0)


def _read(source: Any, root: Path | None, where: str) -> tuple[np.ndarray, int, bool]:
    """(samples, rate, whether there is more than was read)."""
    if isinstance(source, np.ndarray):
        return source, RATE, False
    if isinstance(source, tuple) and len(source) == 2:
        try:
            return np.asarray(source[0]), check_rate(source[1], where), False
        except ValueError as error:  # lists of different lengths
            if isinstance(error, MediaError):
                raise
            text = (
                f"{where}: samples must be one array, [samples] or [samples, channels]; got parts of different shapes."
            )
            raise MediaError("samples are not floats", text) from None
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        kind = type(source).__name__
        raise MediaError("not audio", f"{where} must be a path, bytes, samples or (samples, rate), got {kind}.")
    file = opened(source, root, where)
    soundfile = library("soundfile", "Reading audio")
    try:
        with soundfile.SoundFile(file) as stream:
            rate = check_rate(stream.samplerate, where)
            samples = stream.read(30 * rate + 1, dtype="float32", always_2d=True)
            notes = stream.extra_info
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        return (*_sound_track(file, where, str(error)), False)
    more = len(samples) > 30 * rate
    if not more and (found := CUT_SHORT.search(notes)):
        promised, there = int(found[1]), int(found[2])
        if there < 0.99 * promised and promised < UNKNOWN_SIZE:  # less is a slip of who wrote the header
            text = f"{where}: {name_of(file)} is truncated: of {promised} bytes of samples {there} are there."
            raise MediaError("truncated audio", text)
    return samples[: 30 * rate], rate, more


def _sound_track(file: Path | io.BytesIO, where: str, reason: str) -> tuple[np.ndarray, int]:
    """The audio of a container that soundfile does not know (m4a, mp4, webm)."""
    from gemma4_jax.media.videos import sound_track

    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        found = sound_track(file)
    except MediaError:
        found = None
    if found is None:
        reason = (reason.splitlines() or [""])[0].rstrip(".")
        text = f"{where}: {name_of(file)} is not audio that soundfile or PyAV can read ({reason})."
        raise MediaError("not audio", text)
    return found, RATE


def check_rate(rate: Any, where: str) -> int:
    """A sample rate in Hz as an int; MediaError outside of RATES."""
    low, high = RATES
    if not isinstance(rate, int | float | np.integer | np.floating) or not low <= rate <= high or rate != int(rate):
        text = f"{where} has a sample rate of {rate!r} Hz; wanted a whole number from {low} to {high}."
        raise MediaError("sample rate", text)
    return int(rate)

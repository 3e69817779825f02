"""Where media come from: a path inside the media root, bytes, or a library's own object; and how they are refused."""

import importlib
import io
from pathlib import Path
from typing import Any

from gemma4_jax.chat_check import ChatError
from gemma4_jax.errors import UserError

LARGEST_FILE = 1 << 30
"""Bytes of a file that is opened at all."""

EXTRAS = {
    "PIL.Image": "Pillow",
    "PIL.ImageOps": "Pillow",
    "PIL.ImageDraw": "Pillow",
    "av": "PyAV",
    "soundfile": "soundfile",
    "soxr": "soxr",
}


class MediaError(ChatError):
    """A picture, sound or video that cannot be used: one sentence, and the kind of fault for statistics."""


def library(name: str, purpose: str) -> Any:
    """An optional module; UserError names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        text = f"{purpose} needs {EXTRAS[name]}, which is not installed: pip install 'gemma4_jax[media]'."
        raise UserError(text) from None


def opened(source: str | Path | bytes | bytearray | memoryview, root: Path | None, where: str) -> Path | io.BytesIO:
    """A file to read: a path, relative ones below `root`, or bytes.

    With a root nothing outside of it is opened, links included. Without one every path is allowed: the caller named it.

    Raises:
      MediaError: a URL, a path outside the root, no such file, an empty or a huge one.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise MediaError("empty media file", f"{where} is empty: 0 bytes.")
        return io.BytesIO(bytes(source))
    text = str(source)
    if "://" in text or text.startswith("data:"):
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise MediaError("media URL", f"{where} is the URL {shown!r}; download it and give the path of the file.")
    if "\0" in text:
        raise MediaError("no such media file", f"{where}: a path cannot hold a zero byte.")
    path = Path(text)
    if root is not None:
        base = root.resolve()
        path = (base / path).resolve()
        if not path.is_relative_to(base):
            raise MediaError("media outside the root", f"{where}: {text!r} lies outside the media root {str(root)!r}.")
    try:
        if not path.is_file():
            raise MediaError("no such media file", f"{where}: there is no file {str(path)!r}.")
        size = path.stat().st_size
    except OSError as error:
        raise MediaError("no such media file", f"{where}: {text!r} cannot be opened ({error.strerror}).") from None
    if not size:
        raise MediaError("empty media file", f"{where}: {str(path)!r} is empty: 0 bytes.")
    if size > LARGEST_FILE:
        raise MediaError(
            "media file too large", f"{where}: {str(path)!r} has {size} bytes; at most {LARGEST_FILE} are read."
        )
    return path


def name_of(file: Path | io.BytesIO) -> str:
    """The file for a message."""
    return repr(str(file)) if isinstance(file, Path) else "the bytes"

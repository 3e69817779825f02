"""Pictures: from a file or an array to the patches of the vision tower, as transformers' Pillow backend makes them.

A picture is resized, up as well as down, to the largest multiple of 48 pixels a side that keeps its shape and has no more soft
tokens than its budget. Source: transformers 5.23, models/gemma4/image_processing_pil_gemma4.py.
"""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.config_media import VisionConfig
from gemma4_jax.errors import UserError
from gemma4_jax.media.files import MediaError, library, name_of, opened
from gemma4_jax.media.pieces import ImagePiece

BUDGETS = (70, 140, 280, 560, 1120)
"""Most soft tokens of a picture, as the models were trained."""

MOST_PIXELS = 100_000_000
"""Of a picture as stored; more is a mistake or an attack (a small file that unpacks to gigabytes)."""


def check_budget(budget: int, key: str) -> None:
    """UserError unless the models were trained with this many soft tokens."""
    if budget not in BUDGETS:
        raise UserError(f"{key} is one of {', '.join(map(str, BUDGETS))} soft tokens, got {budget!r}.")


def image_piece(source: Any, vision: VisionConfig, budget: int, root: Path | None = None, where: str = "The image"):
    """The patches of a picture: a path, bytes, a Pillow image, or an array [H, W], [H, W, 1 | 3 | 4], uint8 or float in 0..1.

    Raises:
      MediaError: anything wrong with it, in one sentence that begins with `where`.
    """
    return patches_of(pixels_of(source, root, where), vision, budget)


def pixels_of(source: Any, root: Path | None = None, where: str = "The image") -> np.ndarray:
    """uint8 [H, W, 3], turned upright by its EXIF tag; transparency is dropped, as by the reference."""
    image_module = library("PIL.Image", "Reading pictures")
    if isinstance(source, np.ndarray):
        return _pixels_of_array(source, where)
    if isinstance(source, image_module.Image):
        return _pixels_of_pillow(source, where, "the picture")
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        kind = type(source).__name__
        raise MediaError("not an image", f"{where} must be a path, bytes, an array or a Pillow image, got {kind}.")
    file = opened(source, root, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns where the size is doubtful; `_check_size` decides
        try:
            # From memory: of a file Pillow reads as many bytes as a broken length says, and Python makes room for 4 GB first.
            content = io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file
            with image_module.open(content) as image:
                return _pixels_of_pillow(image, where, name_of(file))
        except image_module.DecompressionBombError:
            raise _bomb(where, name_of(file), "hundreds of millions of") from None
        except image_module.UnidentifiedImageError:
            text = f"{where}: {name_of(file)} is not an image that Pillow can read."
            raise MediaError("not an image", text) from None
        except MediaError:
            raise
        except (
            Exception
        ) as error:  # of a broken file Pillow's readers raise anything: OSError, SyntaxError, struct.error
            text = f"{where}: {name_of(file)} is damaged ({type(error).__name__}: {error})."
            raise MediaError("damaged image", text) from error


def target_size(height: int, width: int, vision: VisionConfig, budget: int) -> tuple[int, int]:
    """Height and width a picture is resized to, multiples of `vision.cell_size` with at most `budget` soft tokens."""
    side = vision.cell_size
    factor = math.sqrt(budget * side**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * side, columns * side


def patches_of(pixels: np.ndarray, vision: VisionConfig, budget: int, kind: str = "image") -> ImagePiece:
    """uint8 [H, W, 3], resized and cut: bicubic with antialiasing, rounded to bytes."""
    image_module = library("PIL.Image", "Reading pictures")
    stored_height, stored_width, _ = pixels.shape
    height, width = target_size(stored_height, stored_width, vision, budget)
    if (height, width) != (stored_height, stored_width):
        image = image_module.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(image.resize((width, height), image_module.Resampling.BICUBIC))
    pool, patch = vision.pooling_kernel_size, vision.patch_size
    rows, columns = height // vision.cell_size, width // vision.cell_size
    # rows of cells, rows of patches in a cell, rows of pixels in a patch; the same for columns; colours
    cut = pixels.reshape(rows, pool, patch, columns, pool, patch, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    cells = np.ascontiguousarray(cut).reshape(rows * columns, vision.cell_patches, vision.patch_values)
    return ImagePiece(cells, columns, budget, kind)


def patch_positions(count: int, columns: int, pool: int) -> np.ndarray:
    """int32 [count, pool * pool, 2]: (column, row) in the picture of every patch of every cell."""
    cell, inside = np.arange(count)[:, None], np.arange(pool * pool)[None]
    x = (cell % columns) * pool + inside % pool
    y = (cell // columns) * pool + inside // pool
    return np.stack([x, y], axis=-1).astype(np.int32)


def _pixels_of_pillow(image: Any, where: str, name: str) -> np.ndarray:
    width, height = image.size
    _check_size(width, height, where, name)
    operations = library("PIL.ImageOps", "Reading pictures")
    try:
        image = operations.exif_transpose(image)
        return np.asarray(_as_rgb(image))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise MediaError("damaged image", f"{where}: {name} is damaged or truncated ({error}).") from None


def _as_rgb(image: Any) -> Any:
    """Three bytes a pixel. Greys of 16 bits are scaled: Pillow's own conversion would cut them off at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image, np.float64)
        wide = values.max(initial=0) > 255
        image = library("PIL.Image", "Reading pictures").fromarray(
            np.clip(np.rint(values / 257 if wide else values), 0, 255).astype(np.uint8)
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels_of_array(array: np.ndarray, where: str) -> np.ndarray:
    """An array as bytes [H, W, 3]."""
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        text = f"{where}: an array must be [height, width] or [height, width, 1, 3 or 4 colours], got {list(shape)}."
        raise MediaError("array is no image", text)
    _check_size(array.shape[1], array.shape[0], where, "the array")
    if array.dtype != np.uint8:
        bad = not np.issubdtype(array.dtype, np.floating) or not np.all((array >= 0) & (array <= 1))
        if bad:
            text = f"{where}: an array must be uint8, or floats from 0 to 1, got {array.dtype} outside of that."
            raise MediaError("array is no image", text)
        array = np.rint(array * 255).astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def _check_size(width: int, height: int, where: str, name: str) -> None:
    if width < 1 or height < 1:
        raise MediaError("empty image", f"{where}: {name} has no pixels ({width} x {height}).")
    if width * height > MOST_PIXELS:
        raise _bomb(where, name, f"{width} x {height}")


def _bomb(where: str, name: str, pixels: str) -> MediaError:
    return MediaError("image too large", f"{where}: {name} has {pixels} pixels; at most {MOST_PIXELS} are read.")


def encoded_as(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """A picture file of uint8 [H, W, 3], for tests and examples."""
    buffer = io.BytesIO()
    library("PIL.Image", "Writing pictures").fromarray(pixels).save(buffer, form)
    return buffer.getvalue()

"""Boxes and points that a model answers with, in pixels of the picture it was asked about, and drawn into it.

The models write JSON, often inside a Markdown fence: `[{"box_2d": [y0, x0, y1, x1], "label": "cat"}]` or
`[{"point": [y, x], "label": "cat"}]`, y first, from 0 at the top or the left to 1000 at the bottom or the right, whatever the
picture's size.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_jax.errors import UserError
from gemma4_jax.media.files import library
from gemma4_jax.media.images import pixels_of

SCALE = 1000
KEYS = {"box_2d": 4, "point": 2}
"""Key -> how many numbers it has."""

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Box:
    """A rectangle as a share of the picture, 0 to 1000: top, left, bottom, right."""

    top: float
    left: float
    bottom: float
    right: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in a picture of this size, as Pillow takes them; right and bottom lie outside."""
        return (*_at(self.left, self.top, width, height), *_at(self.right, self.bottom, width, height))


@dataclass(frozen=True)
class Point:
    """A place as a share of the picture, 0 to 1000."""

    y: float
    x: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """(x, y) of a pixel inside a picture of this size."""
        x, y = _at(self.x, self.y, width, height)
        return min(x, width - 1), min(y, height - 1)


def parse_places(text: str) -> list[Box | Point]:
    """The boxes and points of an answer, in its order; an empty list where the answer is an empty one.

    The JSON may stand alone, in a fence, or within other text; a box with its corners the wrong way round is turned.

    Raises:
      UserError: no JSON with boxes or points, numbers outside of 0 to 1000, or as many as do not belong there.
    """
    for candidate in _candidates(text):
        try:
            content = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        items = content if isinstance(content, list) else [content]
        if items and all(isinstance(item, int | float) for item in items) and len(items) == KEYS["box_2d"]:
            items = [{"box_2d": items}]
        if all(isinstance(item, Mapping) and KEYS.keys() & item.keys() for item in items):
            return [_place(item) for item in items]
    raise UserError(
        f'the answer has no boxes or points: wanted JSON like [{{"box_2d": [y0, x0, y1, x1], "label": "..."}}], got {text[:200]!r}.'
    )


def draw_places(image: Any, places: Iterable[Box | Point], *, width: int | None = None) -> Any:
    """A Pillow image: the picture (a path, bytes, array or Pillow image) with boxes and points in it, each label in its colour.

    `width` is that of lines, in pixels; None: by the picture's size.
    """
    pixels = np.ascontiguousarray(pixels_of(image))
    picture = library("PIL.Image", "Drawing boxes").fromarray(pixels)
    pen = library("PIL.ImageDraw", "Drawing boxes").Draw(picture)
    line = width or max(1, round(min(picture.size) / 200))
    colours: dict[str, str] = {}
    for place in places:
        colour = colours.setdefault(place.label, COLOURS[len(colours) % len(COLOURS)])
        if isinstance(place, Box):
            left, top, right, bottom = place.pixels(*picture.size)
            pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
            corner = left + 2 * line, top + 2 * line
        else:
            x, y = place.pixels(*picture.size)
            radius = 3 * line
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white")
            corner = x + radius + line, y - radius
        if place.label:
            pen.rectangle(pen.textbbox(corner, place.label), fill="white")
            pen.text(corner, place.label, fill=colour)
    return picture


def _candidates(text: str) -> Iterator[str]:
    """Pieces of a text that may be JSON: all of it, what fences hold, from the first bracket to the last."""
    yield text
    for match in FENCE.finditer(text):
        yield match[1]
    for opening, closing in ("[]", "{}"):
        start, stop = text.find(opening), text.rfind(closing)
        if 0 <= start < stop:
            yield text[start : stop + 1]


def _place(item: Mapping[str, Any]) -> Box | Point:
    key = next(key for key in KEYS if key in item)
    numbers, label = item[key], str(item.get("label") or "")
    good = isinstance(numbers, list) and len(numbers) == KEYS[key]
    if not good or not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= SCALE for n in numbers):
        raise UserError(f"{key} has {KEYS[key]} numbers from 0 to {SCALE}, y first, got {numbers!r}.")
    if key == "point":
        return Point(*numbers, label=label)
    top, left, bottom, right = numbers
    return Box(min(top, bottom), min(left, right), max(top, bottom), max(left, right), label)


def _at(x: float, y: float, width: int, height: int) -> tuple[int, int]:
    return round(x * width / SCALE), round(y * height / SCALE)

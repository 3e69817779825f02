"""Draws pictures of coloured shapes and plays tones, with questions about them: what a tiny model learns in minutes.

Every picture has one shape of one colour at a random place, of random size, on a random grey; pictures differ in size and form.
A tone is low, middle or high, of random length and loudness, with some noise. The held-out rows are about other pictures.

    python -m gemma4_jax.assets.make_media runs/media        # pictures/, sounds/, train.jsonl, heldout.jsonl
"""

import argparse
import json
import math
import random
import wave
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.errors import UserError

COLOURS = {"red": (220, 40, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")
TONES = {"low": (150, 250), "middle": (600, 900), "high": (2500, 4000)}
"""Name -> lowest and highest frequency in Hz."""

RATE = 16_000
QUESTIONS = {"colour": "Which colour is it?", "shape": "Which shape is it?", "tone": "Is the tone low, middle or high?"}


def picture(path: Path, colour: str, shape: str, rng: random.Random) -> None:
    """One shape of one colour."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise UserError(
            "Drawing pictures needs Pillow, which is not installed: pip install 'gemma4_jax[media]'."
        ) from None
    width, height = rng.randrange(88, 137), rng.randrange(88, 137)
    grey = rng.randrange(90, 256)
    image = Image.new("RGB", (width, height), (grey, grey, grey))
    radius = rng.uniform(0.36, 0.45) * min(width, height)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    fill = tuple(min(255, max(0, value + rng.randrange(-20, 21))) for value in COLOURS[colour])
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=fill)
    image.save(path)


def sound(path: Path, tone: str, rng: random.Random) -> None:
    """A tone with noise, 16 bits at 16 kHz."""
    low, high = TONES[tone]
    frequency, loudness, length = rng.uniform(low, high), rng.uniform(0.1, 0.6), int(rng.uniform(0.3, 0.9) * RATE)
    samples = (loudness * math.sin(2 * math.pi * frequency * i / RATE) + rng.gauss(0, 0.01) for i in range(length))
    data = array("h", (int(32767 * max(-1.0, min(1.0, value))) for value in samples))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(data.tobytes())


def row(task: str, kind: str, path: str, answer: str) -> dict[str, Any]:
    """A question about a medium, and its answer."""
    content = [{"type": kind, "path": path}, {"type": "text", "text": QUESTIONS[task]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"task": task, "messages": messages}


def build(directory: Path, pictures: int, sounds: int, rng: random.Random, prefix: str) -> list[dict[str, Any]]:
    """Draws and plays; the rows in random order. Every picture is asked about twice."""
    rows = []
    for name in ("pictures", "sounds"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        colour, shape, path = rng.choice([*COLOURS]), rng.choice(SHAPES), f"pictures/{prefix}{number:05d}.png"
        picture(directory / path, colour, shape, rng)
        rows += [row("colour", "image", path, colour), row("shape", "image", path, shape)]
    for number in range(sounds):
        tone, path = rng.choice([*TONES]), f"sounds/{prefix}{number:05d}.wav"
        sound(directory / path, tone, rng)
        rows.append(row("tone", "audio", path, tone))
    rng.shuffle(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the directory, the same bytes for the same arguments, and says what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pictures", type=int, default=900, help="for training")
    parser.add_argument("--sounds", type=int, default=300, help="for training")
    parser.add_argument("--heldout", type=int, default=40, help="pictures, and as many sounds, for measuring")
    parser.add_argument("--seed", type=int, default=4)
    given = parser.parse_args(arguments)
    for name, pictures, sounds in (("train", given.pictures, given.sounds), ("heldout", given.heldout, given.heldout)):
        rows = build(given.directory, pictures, sounds, random.Random(f"{given.seed}/{name}"), f"{name}_")
        path = given.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        print(f"{path}: {len(rows)} questions about {pictures} pictures and {sounds} sounds")


if __name__ == "__main__":
    main()

"""`python -m tests.fuzz [WHAT ...] [--seconds N]`: broken files by the thousand at every front end that reads them.

A seed file is changed at random, bytes and JSON values, and given to the reader. It may be read, or refused with a UserError of
one sentence; within a second of CPU time (WAIT seconds of any, for other work may have the cores), and without taking more memory
than twice the file and some (LIMIT). Anything else is a failure.
Every case follows from --seed and its number.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.errors import UserError

LIMIT = 64 << 20
"""Bytes on top of twice the file: Python objects of small files weigh many times what they have in bytes."""

WAIT = 10.0

ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    7,
    2**31 - 1,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    1e308,
)
ODD_TEXTS = (
    "",
    "\x00",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "a" * 100_000,
    "F32",
    "BF16",
    "I4",
    "\u202e",
    "<|turn>",
    "🙂",
)
ODD_VALUES: tuple[Any, ...] = (*ODD_NUMBERS, *ODD_TEXTS, None, True, [], {}, [[[[]]]], {"a": {"b": {}}})


def changed_bytes(content: bytes, generator: random.Random) -> bytes:
    """Flipped, cut, doubled, or with a piece of something else in it."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        if not data:
            break
        at = generator.randrange(len(data))
        kind = generator.randrange(6)
        if kind == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[at : at + generator.choice((1, 7, len(data)))]
        elif kind == 2:
            data[at:at] = data[at : at + generator.choice((1, 8, 100))]
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", generator.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(data))))
        elif kind == 4:
            data[at:at] = generator.choice(
                (b"\x00", b"\xff" * 9, b"\n", b'"', b"{" * 2000, b"[" * 2000, b"\xed\xa0\x80")
            )
        else:
            data[at] = generator.randrange(256)
    return bytes(data)


def changed_json(value: Any, generator: random.Random) -> Any:
    """The same with some values, keys or numbers replaced."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 1, 3))):
        places = list(_places(value))
        holder, key = generator.choice(places)
        kind = generator.randrange(5)
        if kind == 0:
            holder[key] = copy.deepcopy(generator.choice(ODD_VALUES))  # the next change may be inside it
        elif kind == 1 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] += generator.choice((-1, 1, 8, 10**9))
        elif kind == 2 and isinstance(holder, dict):
            holder[generator.choice(ODD_TEXTS)] = holder.pop(key)
        elif kind == 3:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(generator.choice(places)[0])
        if not value:
            break
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Target:
    """A front end: `case(generator)` makes the files in `directory`, `read()` reads them."""

    def __init__(self, directory: Path):
        self.directory = directory

    def case(self, generator: random.Random) -> None:
        raise NotImplementedError

    def read(self) -> None:
        raise NotImplementedError

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.directory.iterdir())


class Safetensors(Target):
    """Headers, offsets, shapes, dtypes and data of a safetensors file."""

    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [128, 144]},
        "model.layers.0.layer_scalar": {"dtype": "F16", "shape": [1], "data_offsets": [144, 146]},
    }

    def case(self, generator):
        header = as_json(self.header if generator.random() < 0.3 else changed_json(self.header, generator))
        if generator.random() < 0.1:
            header = header[:-1] + b', "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        content = struct.pack("<Q", len(header)) + header + bytes(range(146))
        if generator.random() < 0.5:
            content = changed_bytes(content, generator)
        (self.directory / "model.safetensors").write_bytes(content)

    def read(self):
        from gemma4_jax.checkpoint.shards import tensors_of

        for tensor in tensors_of(self.directory).values():
            for _, _block in tensor.blocks():
                pass


class Index(Safetensors):
    """The index of shards: paths, names, holes."""

    def case(self, generator):
        super().case(random.Random(0))
        (self.directory / "model.safetensors").rename(self.directory / "model-00001-of-00001.safetensors")
        names = {name: "model-00001-of-00001.safetensors" for name in self.header if not name.startswith("_")}
        index = {"metadata": {"total_size": 146}, "weight_map": names}
        content = as_json(changed_json(index, generator))
        if generator.random() < 0.3:
            content = changed_bytes(content, generator)
        (self.directory / "model.safetensors.index.json").write_bytes(content)


class Config(Target):
    """config.json of a Hugging Face directory, both spellings."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        from gemma4_jax.config import ModelConfig

        variants = ("tiny_e2b", "tiny_26b_a4b", "31b")
        self.seeds = [ModelConfig.variant(v).to_hf(spelling=s) for v in variants for s in ("new", "old")]  # type: ignore[arg-type]

    def case(self, generator):
        content = as_json(changed_json(generator.choice(self.seeds), generator))
        if generator.random() < 0.2:
            content = changed_bytes(content, generator)
        (self.directory / "config.json").write_bytes(content)

    def read(self):
        from gemma4_jax.checkpoint.hf import read_config

        cfg = read_config(self.directory)
        assert len(cfg.layer_kinds) == cfg.num_hidden_layers
        assert cfg.stacks


class Rows(Target):
    """JSONL of chats: bad JSON, odd roles, huge lines, NUL, surrogates."""

    rows = (
        {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]},
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
                    },
                }
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]},
                {"role": "tool", "name": "f", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
        },
    )

    def __init__(self, directory: Path):
        super().__init__(directory)
        from gemma4_jax import assets
        from gemma4_jax.processor import Processor

        self.processor = Processor.load(assets.TOKENIZER)

    def case(self, generator):
        lines = [as_json(changed_json(generator.choice(self.rows), generator)) for _ in range(3)]
        content = b"\n".join([as_json(self.rows[0]), *lines])
        if generator.random() < 0.4:
            content = changed_bytes(content, generator)
        (self.directory / "rows.jsonl").write_bytes(content)

    def read(self):
        from gemma4_jax.data.pipeline import DataConfig, make_loader

        config = DataConfig(
            paths=str(self.directory / "rows.jsonl"), seq_len=64, batch_size=1, epochs=1, prefetch=0, max_bad=1.0
        )
        loader = make_loader(config, self.processor)
        try:
            for _ in loader:
                pass
        finally:
            loader.close()


class TokenizerFile(Target):
    """A SentencePiece model."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        from gemma4_jax import assets

        self.seed = Path(assets.TOKENIZER).read_bytes()

    def case(self, generator):
        (self.directory / "tokenizer.model").write_bytes(changed_bytes(self.seed, generator))

    def read(self):
        from gemma4_jax.processor import Processor

        Processor.load(self.directory / "tokenizer.model")


class Image(Target):
    """Pictures: PNG, JPEG, GIF."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        from PIL import Image as pillow

        picture = pillow.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
        self.seeds = []
        for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
            buffer = io.BytesIO()
            picture.save(buffer, form)
            self.seeds.append(buffer.getvalue())

    def case(self, generator):
        (self.directory / "picture").write_bytes(changed_bytes(generator.choice(self.seeds), generator))

    def read(self):
        from gemma4_jax.media.images import pixels_of

        pixels_of(self.directory / "picture")


class Sound(Target):
    """Sounds: WAV."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(np.random.default_rng(0).integers(-3000, 3000, 1600, np.int16).tobytes())
        self.seed = buffer.getvalue()

    def case(self, generator):
        (self.directory / "sound.wav").write_bytes(changed_bytes(self.seed, generator))

    def read(self):
        from gemma4_jax.media.sounds import waveform

        waveform(self.directory / "sound.wav")


class Video(Target):
    """Films: MP4 and WebM, with and without their sound."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        import av

        self.seeds = []
        for form, codec in (("mp4", "mpeg4"), ("webm", "libvpx")):
            buffer = io.BytesIO()
            with av.open(buffer, "w", format=form) as container:
                stream: Any = container.add_stream(codec, rate=8)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for shade in range(0, 240, 30):
                    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            self.seeds.append(buffer.getvalue())

    def case(self, generator):
        (self.directory / "film").write_bytes(changed_bytes(generator.choice(self.seeds), generator))

    def read(self):
        from gemma4_jax.media.videos import film_of

        film_of(self.directory / "film", 4, listen=True)


WHAT: dict[str, type[Target]] = {
    "safetensors": Safetensors,
    "index": Index,
    "config": Config,
    "rows": Rows,
    "tokenizer": TokenizerFile,
    "image": Image,
    "sound": Sound,
    "video": Video,
}


def fuzz(kind: type[Target], seconds: float, seed: int, most: int | None = None) -> tuple[int, int, list[str]]:
    """(cases, refused, what went wrong) in so many seconds, or after `most` cases."""
    cases, refused, wrong, end = 0, 0, [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        target = kind(Path(name))
        _warm(target)
        tracemalloc.start()
        try:
            while time.monotonic() < end and (most is None or cases < most) and len(wrong) < 5:
                for path in target.directory.iterdir():
                    path.unlink()
                target.case(random.Random(f"{seed}-{cases}"))
                complaint, was_refused = _one(target)
                if complaint:
                    wrong.append(f"case {cases}: {complaint}")
                refused += was_refused
                cases += 1
        finally:
            tracemalloc.stop()
    return cases, refused, wrong


def _warm(target: Target) -> None:
    """What is imported and compiled once does not count."""
    target.case(random.Random("warm"))
    with contextlib.suppress(UserError):
        target.read()


def _one(target: Target) -> tuple[str, bool]:
    size = target.size()
    tracemalloc.reset_peak()
    before, began, refused = tracemalloc.get_traced_memory()[0], (time.process_time(), time.perf_counter()), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read()
    except UserError as error:
        refused = True
        if "\n" in str(error).strip() or not str(error).strip():
            return f"refused in {len(str(error).splitlines())} lines: {str(error)[:200]!r}", True
        if len(str(error)) > 2000:
            return f"refused in {len(str(error))} characters: {str(error)[:200]!r}", True
    except Exception as error:  # whatever a reader raises is what this is after
        return f"{type(error).__name__}: {str(error)[:200]}", False
    computed, passed = time.process_time() - began[0], time.perf_counter() - began[1]
    peak = tracemalloc.get_traced_memory()[1] - before
    if computed > 1 or passed > WAIT:  # tracing itself slows a read with many small objects down by ten
        computed, passed = _untraced(target)
    if computed > 1 or passed > WAIT:
        return f"computed {computed:.1f} s and took {passed:.1f} s", refused
    if peak > 2 * size + LIMIT:
        return f"held {peak:,} bytes for a file of {size:,}", refused
    return "", refused


def _untraced(target: Target) -> tuple[float, float]:
    """Seconds of CPU and of the clock that a read takes by itself."""
    tracemalloc.stop()
    began = time.process_time(), time.perf_counter()
    with warnings.catch_warnings(), contextlib.suppress(UserError):
        warnings.simplefilter("ignore")
        target.read()
    seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    tracemalloc.start()
    return seconds


def main() -> int:
    """Runs what was asked for, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(WHAT)}; default: all")
    parser.add_argument("--seconds", type=float, default=600, help="for each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = 0
    for name in options.what or WHAT:
        cases, refused, wrong = fuzz(WHAT[name], options.seconds, options.seed)
        print(f"{name}: {cases:,} cases, {refused:,} refused, {len(wrong)} wrong", *wrong, sep="\n  ", flush=True)
        bad |= bool(wrong)
    return bad


if __name__ == "__main__":
    sys.exit(main())

"""The media front end: every kind of source, and everything wrong with one refused in a sentence that says which."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import io
import math
import pickle
import tracemalloc
import wave

import numpy as np
import pytest
from conftest import PROJECT

from gemma4_jax import chat_media
from gemma4_jax.chat import Span
from gemma4_jax.config_media import TOWERS, AudioConfig, VisionConfig
from gemma4_jax.errors import UserError
from gemma4_jax.media import files
from gemma4_jax.media.batch import batch_media, rounded_up
from gemma4_jax.media.files import MediaError
from gemma4_jax.media.frontend import FrontEnd, MediaConfig
from gemma4_jax.media.images import BUDGETS, encoded_as, image_piece, patches_of, pixels_of, target_size
from gemma4_jax.media.pieces import ImagePiece, SoundPiece
from gemma4_jax.media.sounds import RATE, sound_piece, waveform
from gemma4_jax.media.videos import film_of, frame_indices, timestamp
from gemma4_jax.processor import Processor

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")
VISION = VisionConfig()
TINY = TOWERS["tiny_e2b"]
TOKENIZER = PROJECT / "gemma4_jax" / "assets" / "tokenizer.model"


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def tone(seconds: float, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    return np.sin(2 * math.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def movie(frames: list[np.ndarray], fps: int = 8, sound: np.ndarray | None = None, form: str = "mp4") -> bytes:
    av = pytest.importorskip("av", reason="videos need PyAV: the extra `media`")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        size = frames[0].shape[:2] if frames else (48, 64)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        track = container.add_stream("aac", rate=RATE, layout="mono") if sound is not None else None
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            one = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            one.sample_rate = RATE
            container.mux(track.encode(one))
            container.mux(track.encode())
    return buffer.getvalue()


# --- pictures


def test_every_kind_of_picture_gives_the_same_pixels(tmp_path):
    pixels = picture()
    (tmp_path / "a.png").write_bytes(encoded_as(pixels))
    for source in (pixels, encoded_as(pixels), Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(pixels_of(source), pixels)
    np.testing.assert_array_equal(pixels_of(pixels.astype(np.float32) / 255), pixels)
    np.testing.assert_array_equal(pixels_of("a.png", root=tmp_path), pixels)
    grey = pixels[:, :, 0]
    np.testing.assert_array_equal(pixels_of(grey), pixels_of(Image.fromarray(grey)))
    np.testing.assert_array_equal(pixels_of(grey[:, :, None]), pixels_of(grey))


def test_transparency_palettes_and_deep_greys():
    pixels = picture(20, 30)
    alpha = np.concatenate([pixels, np.full((20, 30, 1), 7, np.uint8)], axis=2)
    np.testing.assert_array_equal(pixels_of(encoded_as(alpha)), pixels)
    np.testing.assert_array_equal(pixels_of(alpha), pixels)
    palette = Image.fromarray(pixels).quantize(16)
    np.testing.assert_array_equal(pixels_of(palette), np.asarray(palette.convert("RGB")))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(pixels_of(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    deep = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
    np.testing.assert_allclose(pixels_of(Image.fromarray(deep))[..., 0], deep / 257, atol=0.5)


def test_pictures_stand_upright():
    image = Image.fromarray(picture(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned a quarter
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels_of(buffer.getvalue()), np.rot90(picture(20, 30), -1))


@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes_stay_in_the_budget_and_keep_the_shape(budget):
    rng = np.random.default_rng(budget)
    for _ in range(300):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8.5, 2)))
        rows, columns = (x // 48 for x in target_size(height, width, VISION, budget))
        assert rows >= 1
        assert columns >= 1
        assert rows * columns <= budget
        if rows > 1 and columns > 1:
            assert 0.5 < (rows / columns) / (height / width) < 2.1


def test_cells_hold_the_pixels_of_their_place():
    pixels = picture(96, 144)
    small = VisionConfig(patch_size=4)
    assert target_size(96, 144, VISION, 70) != (96, 144)  # it would be resized
    piece = patches_of(np.asarray(Image.fromarray(pixels).resize((60, 84))), small, 35 * 2)
    assert piece.cells.dtype == np.uint8
    exact = picture(*target_size(100, 100, small, 70))
    piece = patches_of(exact, small, 70)
    columns = piece.columns
    cell, patch = 2 * columns + 1, 5  # third row of cells, second column; second row of patches, third column
    top, left = 2 * 12 + 1 * 4, 1 * 12 + 2 * 4
    np.testing.assert_array_equal(piece.cells[cell, patch].reshape(4, 4, 3), exact[top : top + 4, left : left + 4])


@pytest.mark.parametrize(("length", "count"), [(5000, 70), (30, 45), (1_000_000, 70)])
def test_strips_of_one_pixel_become_one_row(length, count):
    """As in the reference: a soft token for each cell along the strip, at most the budget; it is not refused."""
    strip = np.repeat(picture(1, 1), length, axis=1)
    strip[:, length // 2 :] = 255 - strip[0, 0]
    for pixels, columns in ((strip, count), (strip.transpose(1, 0, 2), 1)):
        piece = image_piece(pixels, VISION, 70)
        assert (piece.count, piece.columns) == (count, columns)
        np.testing.assert_array_equal(piece.cells[0, 0, :3], strip[0, 0])
        np.testing.assert_array_equal(piece.cells[-1, -1, -3:], strip[0, -1])


def bomb() -> bytes:
    """A PNG of 20000 x 20000 pixels in its header and nothing behind it."""
    data = bytearray(encoded_as(picture(8, 8)))
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


BAD_PICTURES = {
    "text": (b"hello, this is no image", "not an image", "is not an image that Pillow can read"),
    "empty": (b"", "empty media file", "is empty: 0 bytes"),
    "truncated": (encoded_as(picture())[:2000], "damaged image", "is damaged or truncated"),
    "bomb": (bomb(), "image too large", "at most 100000000 are read"),
    "no such file": ("nowhere.png", "no such media file", "there is no file"),
    "directory": ("/", "no such media file", "there is no file"),
    "url": ("https://example.com/a.png", "media URL", "download it and give the path"),
    "data url": ("data:image/png;base64,AAAA", "media URL", "download it"),
    "number": (3, "not an image", "must be a path, bytes, an array or a Pillow image, got int"),
    "one axis": (np.zeros(5, np.uint8), "array is no image", r"got \[5\]"),
    "two colours": (np.zeros((5, 5, 2), np.uint8), "array is no image", r"got \[5, 5, 2\]"),
    "floats above one": (np.full((5, 5), 3.0), "array is no image", "floats from 0 to 1"),
    "not a number": (np.full((5, 5), np.nan), "array is no image", "floats from 0 to 1"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "empty image", r"has no pixels \(5 x 0\)"),
    "zero byte": ("a\0b", "no such media file", "zero byte"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures(case):
    source, reason, message = BAD_PICTURES[case]
    with pytest.raises(MediaError, match=f"^Row 3.*{message}") as error:
        image_piece(source, VISION, 280, None, "Row 3")
    assert error.value.reason == reason
    assert str(error.value).count("\n") == 0
    assert pickle.loads(pickle.dumps(error.value)).reason == reason


def test_a_length_inside_a_picture_takes_no_memory(tmp_path):
    """The pixels of a PNG say they have 2 GB; they are read as far as they are there."""
    from PIL import Image

    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    before, mark, after = path.read_bytes().partition(b"IDAT")
    path.write_bytes(before[:-4] + b"\x7f\xff\xff\xff" + mark + after)
    tracemalloc.start()
    np.testing.assert_array_equal(pixels_of(path), pixels)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_nothing_outside_the_root_is_read(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded_as(picture()))
    (root / "link.png").symlink_to(secret)
    for path in ("../secret.png", str(secret), "link.png", "sub/../../secret.png"):
        with pytest.raises(MediaError, match="lies outside the media root"):
            pixels_of(path, root=root)
    (root / "inside.png").write_bytes(encoded_as(picture()))
    assert pixels_of(str(root / "inside.png"), root=root).shape == (60, 90, 3)


def test_missing_libraries_are_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(files.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"needs Pillow, which is not installed: pip install 'gemma4_jax\[media\]'"):
        pixels_of(b"x")


# --- sounds


def test_every_kind_of_sound_gives_the_same_frames(tmp_path):
    pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
    samples = ((tone(0.5) * 32767).astype("<i2") / 32768).astype(np.float32)
    data = wav(tone(0.5))
    (tmp_path / "a.wav").write_bytes(data)
    wanted = sound_piece(samples).mel
    for source in (data, tmp_path / "a.wav", (samples, RATE), np.stack([samples, samples], axis=1)):
        np.testing.assert_allclose(sound_piece(source).mel, wanted, atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_other_rates_are_resampled(rate):
    pytest.importorskip("soxr", reason="resampling needs soxr: the extra `media`")
    found = waveform((tone(1.0, rate), rate))
    assert found.dtype == np.float32
    assert abs(len(found) - RATE) <= 1
    np.testing.assert_allclose(found[2000:-2000], tone(1.0)[2000 : len(found) - 2000], atol=5e-3)


def test_longer_than_thirty_seconds_is_cut_and_said(caplog):
    with caplog.at_level("WARNING"):
        piece = sound_piece(tone(31.0), where="Row 9")
    assert piece.count == 750
    assert "Row 9 is longer than 30 s; only its first 30 s are heard" in caplog.text
    pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert sound_piece(wav(tone(40.0))).count == 750
    assert "only its first 30 s" in caplog.text


BAD_SOUNDS = {
    "no samples": (np.zeros(0, np.float32), "empty audio", "has no samples"),
    "too short": (np.zeros(100, np.float32), "empty audio", "lasts 6.2 ms"),
    "384 kHz": (
        (tone(0.1), 384_000),
        "sample rate",
        "sample rate of 384000 Hz; wanted a whole number from 1000 to 192000",
    ),
    "no rate": ((tone(0.1), None), "sample rate", "sample rate of None Hz"),
    "infinite": (np.full(5000, np.inf, np.float32), "audio is not finite", "not finite"),
    "integers": (np.zeros(5000, np.int16), "samples are not floats", "floats from -1 to 1, got int16"),
    "three axes": (np.zeros((5, 5, 5), np.float32), "empty audio", r"got \[5, 5, 5\]"),
    "text": (b"hello, no audio here" * 100, "not audio", "is not audio that soundfile or PyAV can read"),
    "truncated header": (wav(tone(1.0))[:30], "not audio", "is not audio"),
    "truncated": (wav(tone(1.0))[:20_000], "truncated audio", "truncated: of 32000 bytes of samples 19956 are there"),
    "empty file": (wav(tone(0.0)), "empty audio", "has no samples"),
    "384 kHz file": (wav(tone(0.1, 384_000), 384_000), "sample rate", "sample rate of 384000 Hz"),
    "uneven lists": (([[0.1], [0.2, 0.3]], RATE), "samples are not floats", "parts of different shapes"),
    "words": ((["a", "b"], RATE), "samples are not floats", "must be floats from -1 to 1"),
    "url": ("http://example.com/a.wav", "media URL", "download it"),
    "number": (3, "not audio", "must be a path, bytes, samples"),
}


@pytest.mark.parametrize("case", BAD_SOUNDS)
def test_bad_sounds(case):
    if case in ("text", "truncated", "truncated header", "empty file", "384 kHz file"):
        pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
        pytest.importorskip("av", reason="videos need PyAV: the extra `media`")
    source, reason, message = BAD_SOUNDS[case]
    with pytest.raises(MediaError, match=f"^Row 3.*{message}") as error:
        sound_piece(source, None, "Row 3")
    assert error.value.reason == reason


def test_a_header_from_before_the_sound_ended_is_no_truncation():
    """Who writes into a pipe promises 4 GB; some promise a few bytes too many."""
    pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
    whole = wav(tone(1.0))
    for promised in (2**32 - 1, 2**31 - 1, 32_010):
        data = bytearray(whole)
        data[40:44] = promised.to_bytes(4, "little")
        data[4:8] = min(promised + 36, 2**32 - 1).to_bytes(4, "little")
        np.testing.assert_array_equal(sound_piece(bytes(data)).mel, sound_piece(whole).mel)


# --- videos


def test_frames_at_even_distances():
    assert frame_indices(3, 32) == [0, 1, 2]
    assert frame_indices(100, 4) == [0, 25, 50, 75]
    assert len(set(frame_indices(33, 32))) == 32
    assert timestamp(59.99) == "00:59"
    assert timestamp(61.0) == "01:01"


def test_videos_of_files_arrays_and_pictures():
    frames = [np.full((48, 64, 3), 8 * i, np.uint8) for i in range(20)]
    film = film_of(np.stack(frames), 4, fps=2.0)
    assert [int(frame[0, 0, 0]) for frame in film.frames] == [0, 40, 80, 120]
    assert film.seconds == [0.0, 2.5, 5.0, 7.5]
    assert film_of([Image.fromarray(f) for f in frames], 2).seconds == [0.0, 10 / 24]
    decoded = film_of(movie(frames, fps=8), 4)
    assert [round(float(frame.mean()) / 8) for frame in decoded.frames] == [0, 5, 10, 15]
    assert decoded.seconds == [0.0, 5 / 8, 10 / 8, 15 / 8]
    assert decoded.sound is None


def test_sound_tracks_are_heard():
    pytest.importorskip("soundfile", reason="audio files need soundfile: the extra `media`")
    frames = [picture(48, 64, i) for i in range(8)]
    data = movie(frames, fps=8, sound=tone(1.0))
    assert film_of(data, 2).sound is None
    heard = film_of(data, 2, listen=True).sound
    assert heard is not None
    assert 0.9 * RATE < heard.size < 1.2 * RATE
    assert 0.9 < np.abs(heard).max() < 1.1
    np.testing.assert_allclose(waveform(data), heard)  # a film where a sound is wanted gives its track


BAD_VIDEOS = {
    "no frames": (np.zeros((0, 8, 8, 3), np.uint8), "video without frames", "has no frames"),
    "an empty list": ([], "video without frames", "has no frames"),
    "one picture": (np.zeros((8, 8, 3), np.uint8), "not a video", r"got \[8, 8, 3\]"),
    "text": (b"hello, no video here" * 100, "not a video", "cannot be decoded"),
    "number": (3, "not a video", "got int"),
    "a bad frame": ([picture(), "nowhere.png"], "no such media file", "Row 3, frame 1"),
    "truncated": (lambda: movie([picture(48, 64, i) for i in range(8)])[:-300], "not a video", "cannot be decoded"),
    "no frame written": (lambda: movie([], sound=tone(0.5), form="matroska"), "video without frames", "has no frames"),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_videos(case):
    pytest.importorskip("av", reason="videos need PyAV: the extra `media`")
    source, reason, message = BAD_VIDEOS[case]
    with pytest.raises(MediaError, match=f"^Row 3.*{message}|{message}") as error:
        film_of(source() if callable(source) else source, 4, where="Row 3")
    assert error.value.reason == reason


def test_a_film_of_an_unknown_kind():
    data = movie([picture(48, 64, i) for i in range(4)], fps=8, form="matroska")
    assert b"V_MPEG4/ISO/ASP" in data
    with pytest.raises(MediaError, match=r"^Row 3: the bytes holds frames of a kind that PyAV does not know"):
        film_of(data.replace(b"V_MPEG4/ISO/ASP", b"V_MPEG9/ISO/ASP"), 4, where="Row 3")


def test_a_sound_file_is_no_video():
    pytest.importorskip("av", reason="videos need PyAV: the extra `media`")
    with pytest.raises(MediaError, match="has no video stream"):
        film_of(wav(tone(0.5)), 4)


# --- conversations


def processor(**config) -> Processor:
    front_end = FrontEnd(TINY["vision"], TINY["audio"], MediaConfig(image_tokens=70, **config))
    return Processor.load(TOKENIZER).with_front_end(front_end)


def text_of(part_or_parts, **options):
    parts = part_or_parts if isinstance(part_or_parts, list) else [part_or_parts]
    return [{"role": "user", "content": [{"type": "text", "text": "Look:"}, *parts]}], options


def test_pieces_stand_where_their_placeholders_are():
    parts = [
        {"type": "image", "array": picture()},
        {"type": "text", "text": "and hear"},
        {"type": "audio", "array": tone(1.0)},
        {"type": "video", "array": np.stack([picture(seed=i) for i in range(3)]), "fps": 0.01},
        {"type": "image", "image": Image.fromarray(picture(200, 40))},
    ]
    encoder = processor()
    example = encoder.encode([{"role": "user", "content": parts}], add_generation_prompt=True)
    special, tokens = encoder.tokenizer.special, example.tokens
    assert example.media is not None
    assert [piece.kind for piece in example.media] == ["image", "audio", "video", "video", "video", "image"]
    placeholders = np.isin(tokens, [special.image, special.audio, special.video])
    covered = np.zeros_like(placeholders)
    for piece in example.media:
        here = slice(piece.start, piece.start + piece.count)
        assert (tokens[here] == getattr(special, piece.kind)).all()
        opening, closing = ("audio_open", "audio_close") if piece.kind == "audio" else ("image_open", "image_close")
        assert tokens[piece.start - 1] == getattr(special, opening)
        assert tokens[piece.start + piece.count] == getattr(special, closing)
        covered[here] = True
    assert (covered == placeholders).all()
    assert example.media[1].count == 25
    text = encoder.decode(tokens)
    assert "<image|> 01:40 <|image><|video|>" in text
    assert "03:20" in text
    assert not example.loss_mask.any()


def test_media_in_tool_results_and_answers_come_in_the_rendered_order():
    red, blue, green = (np.full((50, 50, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255), (0, 255, 0)))
    messages = [
        {"role": "user", "content": [{"type": "image", "array": red}, {"type": "text", "text": "Draw."}]},
        {
            "role": "assistant",
            "content": [{"type": "image", "array": green}],
            "tool_calls": [{"id": "1", "function": {"name": "draw", "arguments": {}}}],
        },
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": "ok"}, {"type": "image", "array": blue}],
        },
        {"role": "assistant", "content": "Done."},
    ]
    example = processor().encode(messages)
    assert example.media is not None
    assert [tuple(int(x) for x in piece.cells[0, 0, :3]) for piece in example.media] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 255, 0),
    ]
    for piece in example.media:
        assert not example.loss_mask[piece.start - 1 : piece.start + piece.count + 1].any()
    assert example.loss_mask.any()


BAD_PARTS = {
    "no source": (
        {"type": "image"},
        "media without a source",
        "wants exactly one of path, bytes, array, image, got none",
    ),
    "two": ({"type": "image", "path": "a", "bytes": b"b"}, "media without a source", "got path and bytes"),
    "url": ({"type": "image", "url": "https://x"}, "media URL", "has a url"),
    "option": ({"type": "audio", "array": 1, "sample_rate": 3}, "unknown media option", "did you mean 'sampling_rate'"),
    "budget": ({"type": "image", "array": picture(), "max_soft_tokens": 256}, "soft token budget", "one of 70, 140"),
    "frames": ({"type": "video", "array": picture()[None], "num_frames": 0}, "video option", "at least 1, got 0"),
    "fps": ({"type": "video", "array": picture()[None], "fps": 0}, "frame rate", "fps is a number above 0"),
    "fps of a file": (
        {"type": "video", "path": "a.mp4", "fps": 2},
        "option of arrays",
        "has its own fps; .* num_frames",
    ),
    "rate of a file": (
        {"type": "audio", "path": "a.wav", "sampling_rate": RATE},
        "option of arrays",
        "a file, which has its own sampling_rate",
    ),
    "rate given twice": (
        {"type": "audio", "audio": (tone(1.0), RATE), "sampling_rate": RATE},
        "samples are not floats",
        "parts of different shapes",
    ),
    "text for bytes": ({"type": "image", "bytes": "iVBORw0KGgo="}, "media without a source", "must be bytes, got str"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case):
    part, reason, message = BAD_PARTS[case]
    with pytest.raises(MediaError, match=rf"messages\[0\]\.content\[1\].*{message}") as error:
        processor().encode(text_of(part)[0], add_generation_prompt=True)
    assert error.value.reason == reason


def test_placeholders_in_text_are_more_placeholders_than_media():
    messages = text_of([{"type": "image", "array": picture()}, {"type": "text", "text": "<|image|> or <|video|>"}])[0]
    with pytest.raises(UserError, match=r"has 3 placeholders \(2 image, 1 video\) for 1 media \(1 image\)"):
        processor().encode(messages, add_generation_prompt=True)


def test_fewer_placeholders_than_media():
    """Where a medium is not rendered, whatever the reason, none is put in another's place."""
    messages = text_of({"type": "image", "array": picture()})[0]
    with pytest.raises(UserError, match=r"has 0 placeholders \(none\) for 1 media \(1 image\)"):
        chat_media.expanded([Span("Look:", "user")], messages, processor().front_end.expand)


def test_models_without_eyes_or_ears():
    picture_part, sound_part = {"type": "image", "array": picture()}, {"type": "audio", "array": tone(0.5)}
    deaf = Processor.load(TOKENIZER).with_front_end(FrontEnd(TINY["vision"]))
    with pytest.raises(MediaError, match="this model has no ears: only E2B and E4B hear"):
        deaf.encode(text_of(sound_part)[0], add_generation_prompt=True)
    with pytest.raises(MediaError, match="knows no vision tower"):
        Processor.load(TOKENIZER).encode(text_of(picture_part)[0], add_generation_prompt=True)


def test_front_end_of_a_checkpoint_directory(tmp_path):
    import json

    from gemma4_jax.config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.variant("tiny_e2b", multimodal=True).to_hf()))
    Processor.load(TOKENIZER).save(tmp_path)
    loaded = Processor.load(tmp_path, media=MediaConfig(root="/data"))
    assert loaded.front_end == FrontEnd(TINY["vision"], TINY["audio"], MediaConfig(root="/data"))
    with pytest.raises(UserError, match=r"media\.image_tokens is one of 70, 140, 280, 560, 1120 soft tokens, got 256"):
        MediaConfig(image_tokens=256)


# --- batches


def test_batches_have_few_shapes():
    rng = np.random.default_rng(0)
    vision = TINY["vision"]
    shapes = set()
    for _ in range(60):
        rows = []
        for _ in range(2):
            count, at, pieces = int(rng.integers(0, 4)), 0, []
            for _ in range(count):
                cells = np.zeros((int(rng.integers(1, 71)), vision.cell_patches, vision.patch_values), np.uint8)
                pieces.append(ImagePiece(cells, 7, 70).at(at))
                at += len(cells)
            rows.append(pieces)
        media = batch_media(rows, 512, vision)
        shapes.add(None if media is None else media.images[0].pixels.shape)
    assert len(shapes) <= 6
    assert [rounded_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 25)] == [1, 2, 3, 4, 6, 8, 12, 16, 32]
    assert rounded_up(5, 4) == 8


def test_every_soft_token_has_its_number_and_pictures_their_blocks():
    vision = TINY["vision"]
    image = ImagePiece(np.ones((6, vision.cell_patches, vision.patch_values), np.uint8), 3, 70)
    frame = ImagePiece(np.ones((4, vision.cell_patches, vision.patch_values), np.uint8), 2, 140, "video")
    sound = SoundPiece(np.ones((99, 128), np.float32))
    media = batch_media([[image.at(2), frame.at(10)], [sound.at(3), image.at(40)]], 50, vision)
    assert media is not None
    assert [group.pixels.shape[:2] for group in media.images] == [(2, 70), (1, 140)]
    assert media.sounds is not None
    assert media.sounds.mel.shape == (1, 100, 128)
    assert media.soft_index[0, 2:8].tolist() == list(range(6))
    assert media.soft_index[1, 40:46].tolist() == list(range(70, 76))
    assert media.soft_index[0, 10:14].tolist() == list(range(140, 144))
    assert media.soft_index[1, 3:28].tolist() == list(range(280, 305))
    assert (media.soft_index >= 0).sum() == 6 + 6 + 4 + 25
    assert (media.block_ids > 0).sum() == 6 + 6 + 4
    assert len({int(b) for b in np.unique(media.block_ids)}) == 4
    positions = media.images[0].positions
    assert positions[0, 4].tolist() == [[3 + i % 3, 3 + i // 3] for i in range(9)]
    assert (positions[0, 6:] == -1).all()
    with pytest.raises(ValueError, match="does not fit into 20 slots"):
        batch_media([[image.at(15)]], 20, vision)
    assert batch_media([[], []], 20, None) is None


def test_audio_config_defaults_are_the_published_ones():
    assert AudioConfig().bands == 32
    assert AudioConfig().head_dim == 128

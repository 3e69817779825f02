"""Rows with pictures and sounds on their way into batches: places, shapes, processes, micro-batches, resuming, and bad rows."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportGeneralTypeIssues=false

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from test_media import wav

from gemma4_jax import assets
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.pipeline import DataConfig, Loader, make_loader
from gemma4_jax.errors import UserError
from gemma4_jax.media.batch import MediaShape, batch_media
from gemma4_jax.media.frontend import FrontEnd, MediaConfig
from gemma4_jax.media.pieces import ImagePiece
from gemma4_jax.model.multimodal import soft_frames
from gemma4_jax.processor import Processor
from gemma4_jax.sharding import make_mesh, media_multiple, place_batch

pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")
pytest.importorskip("soundfile", reason="sounds need soundfile: the extra `media`")

from gemma4_jax.assets import make_media

CFG = ModelConfig.variant("tiny_e2b", multimodal=True)
SEQ, BATCH = 320, 4


def seeing(**media) -> Processor:
    processor = Processor.load(assets.TOKENIZER)
    return processor.with_front_end(FrontEnd(CFG.vision, CFG.audio, MediaConfig(image_tokens=70, **media)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("media")
    make_media.main([str(directory), "--pictures=10", "--sounds=8", "--heldout=2"])
    return directory


@pytest.fixture
def load() -> Iterator:
    loaders: list[Loader] = []

    def make(path: Path, processor: Processor | None = None, where: dict | None = None, **settings) -> Loader:
        config = DataConfig(paths=str(path), **{"seq_len": SEQ, "batch_size": BATCH, "prefetch": 0, **settings})
        loaders.append(make_loader(config, processor or seeing(), **(where or {})))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def looked_up(media, row: int) -> list[tuple]:
    """What stands in a row, from the arrays alone: (slots, budget or 'sound', the pixels or frames behind them)."""
    found, base = [], 0
    index = media.soft_index[row]
    for group in media.images:
        count, size = group.pixels.shape[:2]
        for number in range(count):
            here = np.flatnonzero((index >= base + number * size) & (index < base + (number + 1) * size))
            if here.size:
                np.testing.assert_array_equal(index[here], base + number * size + np.arange(here.size))
                found.append((here, size, group.pixels[number, : here.size], group.positions[number, : here.size]))
                assert len(set(media.block_ids[row, here])) == 1
                assert media.block_ids[row, here[0]] > 0
        base += count * size
    if media.sounds is not None:
        for number, (mel, valid) in enumerate(zip(media.sounds.mel, media.sounds.valid, strict=True)):
            size = soft_frames(len(mel))
            here = np.flatnonzero((index >= base + number * size) & (index < base + (number + 1) * size))
            if here.size:
                found.append((here, "sound", mel[valid], None))
                assert not media.block_ids[row, here].any()
    return sorted(found, key=lambda one: one[0][0])


def examples(batch, media=None) -> list[tuple]:
    """(tokens and targets of each example, its media) of a batch, in any order."""
    media, out = batch["media"] if media is None else media, []
    for row in range(len(batch["tokens"])):
        seen = looked_up(media, row)
        for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
            slots = np.flatnonzero(batch["segment_ids"][row] == segment)
            own = [one for one in seen if slots[0] <= one[0][0] <= slots[-1]]
            text = batch["tokens"][row, slots].tolist(), batch["loss_weights"][row, slots].tolist()
            pieces = [(*(one[0] - slots[0]).tolist(), one[1], one[2].tobytes()) for one in own]
            out.append((text, pieces))
    return sorted(out)


def test_pieces_stand_where_their_placeholders_are_and_hold_what_the_processor_made(drawn, load):
    """Every row of the file is found in the packed batches, with its own picture or sound behind its placeholders."""
    loader, processor = load(drawn / "train.jsonl", epochs=1), seeing().below(drawn)
    wanted = []
    for line in (drawn / "train.jsonl").read_text().splitlines():
        example = processor.encode(json.loads(line)["messages"])
        (piece,) = example.media
        values = piece.cells if isinstance(piece, ImagePiece) else piece.mel
        places = tuple(range(piece.start, piece.start + piece.count))
        stop = int(np.flatnonzero(example.loss_mask)[-1])
        text = example.tokens[:stop].tolist(), example.loss_mask[1 : stop + 1].astype(float).tolist()
        kind = piece.budget if isinstance(piece, ImagePiece) else "sound"
        wanted.append((text, [(*places, kind, values.tobytes())]))
    batches = list(loader)
    assert any((batch["segment_ids"] > 1).any() for batch in batches)  # packed
    found = sorted(example for batch in batches for example in examples(batch))
    assert found == sorted(wanted)
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch["media"])) for batch in batches}
    assert len(shapes) == 1, "a step would be compiled more than once"
    assert "a batch has room for" in loader.summary.table()
    assert loader.summary.media.pictures(70) >= 1


def test_a_picture_that_nothing_is_trained_after_is_left_out(tmp_path, load):
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    image = {"type": "image", "path": "a.png"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "colour?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [image, {"type": "text", "text": "again?"}]},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (batch,) = load(tmp_path / "rows.jsonl", epochs=1, batch_size=1)
    assert len(looked_up(batch["media"], 0)) == 1


def test_micro_batches_are_cut_as_the_step_cuts_rows(drawn, load):
    plain = next(load(drawn / "train.jsonl"))
    cut = next(load(drawn / "train.jsonl", where={"parts": 2, "multiple_of": 4}))
    media = cut["media"]
    assert media.images[0].pixels.shape[:2] == (2, media.images[0].pixels.shape[1])
    assert media.images[0].pixels.shape[1] % 4 == 0
    assert media.sounds.mel.shape[1] % 4 == 0
    found = []
    for part in range(2):
        rows = {name: x[part::2] for name, x in cut.items() if name != "media"}
        found += examples(rows, jax.tree.map(lambda x, i=part: x[i], media))
    assert sorted(found) == examples(plain)


def test_processes_together_feed_the_batch_of_one(drawn, load):
    """Shares put one after the other along their first dim, as `place_batch` does, are a batch with all its media."""
    whole = next(load(drawn / "train.jsonl"))
    shares = [next(load(drawn / "train.jsonl", where={"process_index": i, "process_count": 2})) for i in range(2)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *shares)
    assert examples(joined) == examples(whole)


def test_a_run_resumes_to_the_very_next_batch(drawn, load):
    first, second = load(drawn / "train.jsonl", prefetch=2), load(drawn / "train.jsonl")
    next(first)
    next(first)
    place = json.loads(json.dumps(first.state()))
    second.restore(place)
    for one, other in zip(jax.tree.leaves(next(first)), jax.tree.leaves(next(second)), strict=True):
        np.testing.assert_array_equal(one, other)
    other = load(drawn / "train.jsonl", seeing(frame_tokens=140))
    with pytest.raises(UserError, match=r"media.frame_tokens was 70 and is 140"):
        other.restore(place)


def test_bad_media_are_counted_like_other_bad_rows_and_nothing_outside_the_root_is_read(drawn, tmp_path, load):
    """A link out of the root, a path out of it, a URL, no file, a file that is no picture: each its reason, each row named."""
    (tmp_path / "inside").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(next((drawn / "pictures").iterdir()).read_bytes())
    good = tmp_path / "inside" / "good.png"
    good.write_bytes(secret.read_bytes())
    (tmp_path / "inside" / "link.png").symlink_to(secret)
    (tmp_path / "inside" / "text.png").write_text("no picture")
    (tmp_path / "inside" / "cut.png").write_bytes(secret.read_bytes()[:120])
    paths = ["good.png", "link.png", "../secret.png", str(secret), "http://x/y.png", "none.png", "text.png", "cut.png"]
    rows = [make_media.row("shape", "image", path, "circle") for path in paths]
    (tmp_path / "inside" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quarantine = tmp_path / "bad_rows.jsonl"
    loader = load(tmp_path / "inside" / "rows.jsonl", max_bad=1.0, where={"quarantine": quarantine})
    assert loader.summary.skipped == {
        "media outside the root": 3,
        "media URL": 1,
        "no such media file": 1,
        "not an image": 1,
        "damaged image": 1,
    }
    assert loader.summary.examples == 1
    assert "rows.jsonl:2: messages[0].content[0]: 'link.png' lies outside" in quarantine.read_text()
    with pytest.raises(UserError, match=r"7 of 8 rows cannot be used .*data.max_bad=0.5"):
        load(tmp_path / "inside" / "rows.jsonl", max_bad=0.5)
    rooted = load(tmp_path / "inside" / "rows.jsonl", seeing(root=str(tmp_path)), max_bad=1.0)
    assert rooted.summary.skipped["no such media file"] == 5  # paths are relative to the root that is given
    assert rooted.summary.examples == 1


def test_bad_sounds_and_videos_are_counted_too(drawn, tmp_path, load, caplog):
    """Everything of the kind that a file can have wrong, each its reason; a clip that is too long is cut, said, and used."""
    av = pytest.importorskip("av", reason="videos need PyAV: the extra `media`")
    assert av.__version__
    good = next((drawn / "sounds").iterdir()).read_bytes()
    files = {
        "good.wav": good,
        "cut.wav": good[: len(good) // 2],
        "empty.wav": b"",
        "silent.wav": wav(np.zeros(0)),
        "fast.wav": wav(np.zeros(40_000), 384_000),
        "long.wav": wav(np.zeros(31 * 16_000)),
        "text.wav": b"no sound",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    parts = [{"type": "audio", "path": name} for name in [*files, "../out.wav"]]
    parts += [{"type": "audio", "array": samples, "sampling_rate": 16_000} for samples in ([[0.1], [0.2, 0.3]], ["a"])]
    parts += [{"type": "audio", "path": "good.wav", "sampling_rate": 16_000}, {"type": "video", "path": "good.wav"}]
    parts += [{"type": "video", "path": "text.wav"}, {"type": "image", "bytes": "iVBORw0KGgo="}]
    rows = [
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]} for part in parts
    ]
    rows.append({"messages": [{"role": "user", "content": "<|audio|>"}, {"role": "assistant", "content": "yes"}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("WARNING"):
        loader = load(tmp_path / "rows.jsonl", max_bad=1.0, seq_len=1024)
    assert loader.summary.skipped == {
        "truncated audio": 1,
        "empty media file": 1,
        "empty audio": 1,
        "sample rate": 1,
        "not audio": 1,
        "media outside the root": 1,
        "samples are not floats": 2,
        "option of arrays": 1,
        "video without frames": 1,
        "not a video": 1,
        "media without a source": 1,
        "placeholders without media": 1,
    }
    assert loader.summary.examples == 2
    assert "is longer than 30 s; only its first 30 s are heard" in caplog.text
    deaf = Processor.load(assets.TOKENIZER).with_front_end(FrontEnd(CFG.vision, None, MediaConfig(image_tokens=70)))
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: messages\[0\].content\[0\] is audio, but this model has no ears"
    ):
        load(tmp_path / "rows.jsonl", deaf, seq_len=1024)


def test_a_model_without_eyes_takes_no_pictures(drawn, load):
    with pytest.raises(UserError, match=r"image for a model without eyes"):
        load(drawn / "train.jsonl", Processor.load(assets.TOKENIZER))


def test_text_alone_makes_batches_as_ever(tmp_path, load):
    lines = assets.TRAIN.read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    batch = next(load(tmp_path / "rows.jsonl"))
    assert "media" not in batch


def test_shapes_add_and_round():
    a, b = MediaShape(((70, 2),), 1, 90), MediaShape(((70, 1), (280, 5)), 0, 0)
    assert a + b == MediaShape(((70, 3), (280, 5)), 1, 90)
    assert a | b == MediaShape(((70, 2), (280, 5)), 1, 90)
    assert (a + b).rounded(2) == MediaShape(((70, 4), (280, 6)), 2, 100)
    assert not MediaShape()
    assert (a + b).described() == "3 pictures of 70 soft tokens and 5 pictures of 280 soft tokens and 1 sounds of 0.9 s"
    piece = ImagePiece(np.zeros((4, 9, 768), np.uint8), 2, 70)
    with pytest.raises(ValueError, match="2 pictures of 70 soft tokens do not fit into 1"):
        batch_media([[piece, piece.at(10)]], 20, CFG.vision, shape=MediaShape(((70, 1),)))
    with pytest.raises(ValueError, match="no room for pictures of another budget"):
        batch_media([[piece]], 20, CFG.vision, shape=MediaShape(((140, 1),)))


def test_a_batch_is_placed_on_a_mesh_with_its_media(drawn, load):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert media_multiple(None) == 1
    with jax.set_mesh(mesh):
        batch = next(load(drawn / "train.jsonl", where={"multiple_of": media_multiple(mesh)}))
        placed = place_batch(batch)
    media = placed["media"]
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(one, other)
    assert media.images[0].pixels.sharding.spec == jax.sharding.PartitionSpec("fsdp", None, None, None)
    assert media.sounds.valid.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
    assert media.soft_index.sharding.spec == placed["tokens"].sharding.spec

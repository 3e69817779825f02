"""From files to batches: rows, reasons for skipping, packing, processes, and resuming to the very next token."""

import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax import assets
from gemma4_jax.data.chat import BadRow, Encoded
from gemma4_jax.data.pack import best_fit, collate
from gemma4_jax.data.pipeline import DataConfig, Loader, make_loader
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.processor import Processor

SEQ = 64


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(assets.TOKENIZER)


@pytest.fixture
def load(processor):
    """Makes loaders and closes them."""
    loaders: list[Loader] = []

    def make(config: DataConfig, **where: int) -> Loader:
        loaders.append(make_loader(config, processor, **where))  # pyright: ignore[reportArgumentType]
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def chat_row(number: int) -> dict:
    words = " ".join(["word"] * (number % 7))
    return {
        "messages": [
            {"role": "user", "content": f"n {number} {words}"},
            {"role": "assistant", "content": f"ok {number}"},
        ]
    }


def write(path, rows) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """41 chats of different lengths, packed by windows of 16: more than one window, and no size divides another."""
    paths = write(tmp_path / "chat.jsonl", [chat_row(number) for number in range(41)])
    return DataConfig(paths=paths, seq_len=SEQ, batch_size=2, pack_window=16, epochs=1)


def numbers(processor: Processor, batches) -> list[int]:
    """Which chats of `chat_row` are in the batches, read off the trained text, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
                here = (batch["segment_ids"][row] == segment) & (batch["loss_weights"][row] > 0)
                text = processor.decode(batch["targets"][row][here])
                assert text.startswith("ok ")
                assert text.endswith("<turn|>"), "the stop token is trained"
                found.append(int(text.removeprefix("ok ").removesuffix("<turn|>")))
    return found


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# --- rows of files


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a\nb\n", [("a", 1), ("b", 2)]),
        (b"a\nb", [("a", 1), ("b", 2)]),
        (b"\xef\xbb\xbfa\r\n\r\n  \nb \r\n", [("a", 1), ("b", 4)]),
        (b"\n\na", [("a", 3)]),
    ],
)
def test_lines(tmp_path, content, wanted):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows = FileRows([str(path)])
    assert [(row.data.decode(), row.where) for row in rows] == [(text, f"{path}:{line}") for text, line in wanted]


def test_paragraphs_and_files(tmp_path):
    (tmp_path / "1.txt").write_bytes(b"\nfirst\r\nsecond\r\n\r\n\r\nthird")
    (tmp_path / "2.txt").write_bytes(b"fourth\n")
    pattern = [str(tmp_path / "*.txt")]
    assert [row.data for row in FileRows(pattern, "paragraph")] == [b"first\r\nsecond", b"third", b"fourth"]
    assert [row.data for row in FileRows(pattern, "file")] == [b"first\r\nsecond\r\n\r\n\r\nthird", b"fourth"]
    assert len(FileRows(pattern, "line")) == 4


def test_long_lines_any_order_and_pickling(tmp_path):
    lines = ["x" * 3_000_000, "short", "y" * 100_000]
    rows = FileRows([write(tmp_path / "long.jsonl", lines)])
    for index in (2, 0, 1, 0):
        assert rows[index].data.decode() == lines[index]
    assert pickle.loads(pickle.dumps(rows))[1] == rows[1]
    assert rows.num_bytes == sum(map(len, lines))


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    for path, message in (
        ("absent.jsonl", "There is no data file at"),
        ("*.txt", "There is no data file at"),
        ("", "is a directory; name its files"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "every line is blank"),
    ):
        with pytest.raises(UserError, match=message):
            FileRows([str(tmp_path / path)])


def test_a_file_cut_while_in_use(tmp_path):
    rows = FileRows([write(tmp_path / "rows.jsonl", ["one", "two"])])
    os.truncate(tmp_path / "rows.jsonl", 5)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the file became shorter"):
        rows[1]


# --- rows to tokens

CHATS = [
    ("{", "not JSON"),
    ("[1]", "not an object"),
    ('{"text": "x"}', "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "missing content"),
    (
        {"messages": [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "x"}]},
        "longer than the sequence",
    ),
    (
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
        "cannot be tokenised",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]},
        "media without a source",
    ),
    ("[" * 100_000, "not JSON"),
]


def test_bad_rows_are_counted(load, tmp_path, processor):
    paths = write(tmp_path / "chat.jsonl", [chat_row(0), *(row for row, _ in CHATS), chat_row(1)])
    with (tmp_path / "chat.jsonl").open("ab") as file:
        file.write(b'{"messages": "\xff"}\n')
    loader = load(DataConfig(paths=paths, seq_len=SEQ, batch_size=1, epochs=1, max_bad=1.0))
    summary = loader.summary
    assert summary.skipped == Counter([*(reason for _, reason in CHATS), "not UTF-8"])
    assert (summary.rows, summary.checked, summary.examples) == (len(CHATS) + 3, len(CHATS) + 3, 2)
    assert summary.first_bad["not JSON"].startswith(f"{paths}:2: not JSON")
    assert f"{paths}:6: messages[0] has the unknown role 'usr'" in summary.table()
    assert "2 not JSON" in summary.table()
    assert sorted(numbers(processor, loader)) == [0, 1]


@pytest.mark.parametrize(("row", "reason"), CHATS[:8])
def test_bad_rows_can_be_fatal(load, tmp_path, row, reason):
    paths = write(tmp_path / "chat.jsonl", [chat_row(0), row])
    with pytest.raises(BadRow, match=r"chat\.jsonl:2") as caught:
        load(DataConfig(paths=paths, seq_len=SEQ, on_bad_row="error"))
    assert caught.value.reason == reason


def test_only_bad_rows_are_always_fatal(load, tmp_path):
    paths = write(tmp_path / "chat.jsonl", ["{", "{", '{"a": 1}'])
    with pytest.raises(
        UserError, match=r"None of the 3 rows .* \(2 not JSON, 1 no messages\)\. The first: .*:1: not JSON"
    ):
        load(DataConfig(paths=paths, seq_len=SEQ))
    paths = write(tmp_path / "blank.jsonl", [{"question": " ", "answer": "x"}])
    with pytest.raises(UserError, match="1 blank question"):
        load(DataConfig(paths=paths, kind="qa", seq_len=SEQ))


def test_question_and_answer(load, tmp_path, processor):
    paths = write(tmp_path / "qa.jsonl", [{"q": "n 5", "a": "ok 5"}, {"q": "n 6"}])
    config = DataConfig(
        paths=paths, kind="qa", prompt_field="q", response_field="a", seq_len=SEQ, batch_size=1, epochs=1
    )
    loader = load(config)
    (batch,) = loader
    assert loader.summary.skipped == {"no a": 1}
    assert numbers(processor, [batch]) == [5]
    text = processor.decode(batch["tokens"][0][batch["segment_ids"][0] == 1])
    assert text == "<bos><|turn>user\nn 5<turn|>\n<|turn>model\n<|channel>thought\n<channel|>ok 5"


def test_last_turn_and_thoughts(load, tmp_path, processor):
    turns = chat_row(1)["messages"] + chat_row(2)["messages"]
    turns[-1]["reasoning"] = "Easy."
    config = DataConfig(write(tmp_path / "chat.jsonl", [{"messages": turns}]), seq_len=SEQ, batch_size=1, epochs=1)

    def trained(**options):
        loader = load(replace(config, **options))
        (batch,) = loader
        return processor.decode(batch["targets"][batch["loss_weights"] > 0]), loader.summary.notes

    assert trained() == ("ok 1<turn|>ok 2<turn|>", {"with a thought left out (set enable_thinking to train on it)": 1})
    thought = "<|channel>thought\nEasy.\n<channel|>ok 2<turn|>"
    assert trained(train_on="last", enable_thinking=True) == (thought, {})


@pytest.mark.parametrize("packing", [False, True])
def test_long_text_in_pieces(load, tmp_path, processor, packing):
    """Every token after BOS is a target exactly once, and every piece starts with BOS."""
    text = " ".join(str(number) for number in range(80))
    path = tmp_path / "book.txt"
    path.write_text(text)
    config = DataConfig(
        paths=str(path), kind="text", seq_len=32, batch_size=2, shuffle=False, packing=packing, epochs=1
    )
    loader = load(config)
    batches = list(loader)
    tokens, targets, segments = (
        np.concatenate([batch[key] for batch in batches]) for key in ("tokens", "targets", "segment_ids")
    )
    assert processor.decode(targets[segments > 0]) == text + "<eos>"
    starts = np.concatenate([batch["positions"] for batch in batches]) == 0
    assert (tokens[starts] == processor.tokenizer.special.bos).all()
    assert starts.sum() == loader.summary.examples == -(-loader.summary.tokens // 32)
    assert loader.summary.trained == 1.0
    with pytest.raises(UserError, match=r"1 longer than the sequence.*seq_len 32"):
        load(replace(config, split_long=False))


def test_text_in_jsonl_and_paragraphs(load, tmp_path, processor):
    jsonl = write(tmp_path / "text.jsonl", [{"text": "one\n\ntwo"}, {"text": "three"}])
    (tmp_path / "text.txt").write_text("one\n\ntwo\n\nthree")
    common = {"kind": "text", "seq_len": 32, "batch_size": 1, "shuffle": False, "packing": False, "epochs": 1}

    def texts(**options):
        return [
            processor.decode(batch["tokens"][0][batch["segment_ids"][0] > 0])
            for batch in load(DataConfig(**options, **common))
        ]

    assert texts(paths=jsonl) == ["<bos>one\n\ntwo", "<bos>three"]
    assert texts(paths=str(tmp_path / "text.txt"), document="paragraph") == ["<bos>one", "<bos>two", "<bos>three"]
    assert texts(paths=str(tmp_path / "text.txt")) == ["<bos>one\n\ntwo\n\nthree"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "caht"}, "did you mean 'chat'"),
        ({"train_on": "assistent"}, "did you mean 'assistant'"),
        ({"on_bad_row": "raise"}, "known: skip, error"),
        ({"seq_len": 1}, "seq_len is at least 2, got 1"),
        ({"epochs": 0}, "none or at least 1"),
        ({"paths": "a.jsonl,"}, "one of them is empty"),
        ({"paths": "a.jsonl,b.txt", "kind": "text"}, "mixes JSONL and plain text"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{"paths": "x.jsonl", **options})


# --- packing


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit(lengths):
    groups = best_fit(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in group) for group in groups]
    assert all(fill <= 20 for fill in fills)
    assert sum(fill <= 10 for fill in fills) <= 1, "two half-empty sequences would share one"
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_best_fit_refuses_what_cannot_fit():
    for length in (0, 21):
        with pytest.raises(ValueError, match="1 to 20 tokens"):
            best_fit([length], 20)


def test_collate():
    first = Encoded(np.array([2, 5, 6], np.int32), np.array([False, True]))
    second = Encoded(np.array([2, 7], np.int32), np.array([True]))
    batch = collate([[first, second], []], 5, pad=9)
    assert batch["tokens"].tolist() == [[2, 5, 2, 9, 9], [9] * 5]
    assert batch["targets"].tolist() == [[5, 6, 7, 9, 9], [9] * 5]
    assert batch["positions"].tolist() == [[0, 1, 0, -1, -1], [-1] * 5]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 0, 0], [0] * 5]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0, 0], [0] * 5]
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), "int32"),
        "loss_weights": "float32",
    }


# --- loaders


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_row_once(load, config, processor, packing):
    loader = load(replace(config, packing=packing))
    batches = list(loader)
    assert sorted(numbers(processor, batches)) == list(range(41))
    assert len(batches) == loader.num_batches == loader.summary.batches
    used = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    trained = sum(int(batch["loss_weights"].sum()) for batch in batches)
    sequences = sum(int((batch["segment_ids"] > 0).any(-1).sum()) for batch in batches)
    summary = loader.summary
    assert (summary.tokens, summary.trained_tokens, summary.sequences) == (used, trained, sequences)
    assert summary.fill == pytest.approx(used / (sequences * SEQ))
    assert (sequences == 41) == (not packing)


def test_epochs_differ_in_order_only(load, config, processor):
    config = replace(config, epochs=3, batch_size=1, packing=False)
    loader = load(config)
    order = numbers(processor, loader)
    assert loader.num_batches == len(order) == 3 * 41
    epochs = [order[start : start + 41] for start in (0, 41, 82)]
    assert all(sorted(epoch) == list(range(41)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert numbers(processor, load(config)) == order
    assert numbers(processor, load(replace(config, seed=1))) != order


def test_evaluation_order_and_padding(load, config, processor):
    loader = load(replace(config, shuffle=False, packing=False, batch_size=4))
    batches = list(loader)
    assert numbers(processor, batches) == list(range(41))
    assert [int((batch["segment_ids"] > 0).any(-1).sum()) for batch in batches] == [4] * 10 + [1]
    assert all(value.shape == (4, SEQ) for batch in batches for value in batch.values())
    assert batches[-1]["loss_weights"][1:].sum() == 0
    assert (batches[-1]["positions"][1:] == -1).all()
    assert list(loader) == []
    loader.reset()
    assert_equal(list(loader), batches)


@pytest.mark.parametrize("packing", [False, True])
def test_processes_share_each_batch(load, config, packing):
    config = replace(config, packing=packing, epochs=2, batch_size=6)
    alone = list(load(config))
    shares = [list(load(config, process_index=index, process_count=3)) for index in range(3)]
    assert len({len(share) for share in shares}) == 1
    together = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*shares, strict=True)
    ]
    assert_equal(together, alone)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_gives_the_very_next_batch(load, config, packing, prefetch):
    """At the start, inside a window, at and across the ends of windows and epochs, and at the end of all."""
    config = replace(config, packing=packing, prefetch=prefetch, epochs=3)
    batches = list(load(config))
    running = load(config)
    states = [json.loads(json.dumps(running.state()))]
    for _ in running:
        states.append(json.loads(json.dumps(running.state())))
    assert len(states) == len(batches) + 1
    resumed = load(config)
    for done in {
        0,
        1,
        2,
        3,
        len(batches) // 3,
        len(batches) // 3 + 1,
        len(batches) // 2,
        len(batches) - 1,
        len(batches),
    }:
        resumed.restore(states[done])
        assert resumed.state() == states[done]
        assert_equal(list(resumed), batches[done:])


def test_resume_in_the_middle_of_reading(load, config):
    """Going back drops what a thread has made ahead."""
    loader = load(replace(config, epochs=None))
    first = list(islice(loader, 3))
    state = loader.state()
    following = list(islice(loader, 40))
    loader.restore(state)
    assert_equal(list(islice(loader, 40)), following)
    loader.reset()
    assert_equal(list(islice(loader, 3)), first)
    assert loader.num_batches is None


def test_resume_on_another_number_of_processes(load, config):
    config = replace(config, batch_size=4)
    alone = load(config)
    next(alone)
    state = alone.state()
    rest = list(alone)
    shares = [load(config, process_index=index, process_count=2) for index in range(2)]
    for share in shares:
        share.restore(state)
    parts = zip(*(list(share) for share in shares), strict=True)
    assert_equal([{key: np.concatenate([part[key] for part in pair]) for key in pair[0]} for pair in parts], rest)


def test_resume_refuses_other_data(load, config, tmp_path):
    state = load(config).state()
    with pytest.raises(UserError, match=r"cannot go on .* seq_len was 64 and is 128"):
        load(replace(config, seq_len=128)).restore(state)
    write(tmp_path / "chat.jsonl", [chat_row(number) for number in range(40)])
    with pytest.raises(UserError, match="rows was 41 and is 40, bytes was"):
        load(config).restore(state)


def test_a_sample_of_many_rows(load, config, processor):
    whole = load(config).summary
    loader = load(replace(config, check_rows=20))
    summary = loader.summary
    assert (summary.estimated, summary.checked, summary.rows) == (True, 20, 41)
    assert summary.tokens == pytest.approx(whole.tokens, rel=0.15)
    assert summary.sequences == pytest.approx(whole.sequences, rel=0.25)
    assert "41 (estimated from 20)" in summary.table()
    assert loader.num_batches is None
    assert sorted(numbers(processor, loader)) == list(range(41))


def test_rows_found_bad_later(load, tmp_path, processor):
    """Rows outside the sample are skipped when met; a pass without any usable row is an error, not an endless loop."""
    rows = [chat_row(0), *["{"] * 20, chat_row(1)]
    config = DataConfig(
        write(tmp_path / "chat.jsonl", rows), seq_len=SEQ, batch_size=1, check_rows=2, pack_window=4, epochs=1
    )
    assert sorted(numbers(processor, load(config))) == [0, 1]
    loader = load(replace(config, epochs=None))
    write(
        tmp_path / "chat.jsonl",
        ["{" + " " * (len(json.dumps(row)) - 2) + "x" if isinstance(row, dict) else row for row in rows],
    )
    loader._plan.table._lengths[:] = -1  # as if nothing had been looked at
    loader._plan.table._cache.clear()
    with pytest.raises(UserError, match="A whole pass over the data gave no usable row"):
        next(loader)


def test_a_small_cache_changes_nothing(load, config):
    config = replace(config, epochs=2)
    assert_equal(list(load(replace(config, cache_mb=0))), list(load(config)))


def test_grain_finds_the_checkpoints_exact(load, config):
    import grain.experimental

    from gemma4_jax.data.batches import BatchDataset

    loader = load(replace(config, epochs=2))
    grain.experimental.assert_equal_output_after_checkpoint(BatchDataset(loader._plan, 2, 0, 0, 1))


def test_closed_and_misplaced(load, config, processor):
    loader = load(config)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="has been closed"):
        next(loader)
    with pytest.raises(ValueError, match="process_index runs from 0 to 1, got 2"):
        make_loader(config, processor, process_index=2, process_count=2)
    with pytest.raises(UserError, match="batch_size=2 cannot be shared out over 3 processes; choose a multiple"):
        make_loader(config, processor, process_index=2, process_count=3)


def test_published_tokenizer_on_real_questions(shared_data):
    published = Processor.load(shared_data / "tokenizer_gemma4.model")
    config = DataConfig(
        str(shared_data / "gsm8k_test.jsonl"), kind="qa", seq_len=512, batch_size=4, epochs=1, shuffle=False
    )
    loader = make_loader(config, published)
    try:
        assert loader.summary.rows == 1319
        assert loader.summary.examples + sum(loader.summary.skipped.values()) == 1319
        assert loader.summary.fill > 0.95
        batch = next(loader)
        answer = published.decode(batch["targets"][0][(batch["segment_ids"][0] == 1) & (batch["loss_weights"][0] > 0)])
        first = json.loads((shared_data / "gsm8k_test.jsonl").read_text().splitlines()[0])
        assert answer == first["answer"] + "<turn|>"
    finally:
        loader.close()

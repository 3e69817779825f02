"""Rows from tables and records, mixtures of files, and the command that shows what training would see."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gemma4_jax import assets
from gemma4_jax.data.pipeline import DataConfig, make_loader
from gemma4_jax.data.records import open_rows
from gemma4_jax.errors import UserError
from gemma4_jax.processor import Processor
from launch import data

CHATS = [json.loads(line) for line in assets.HELDOUT.read_text().splitlines()[:60]]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(assets.TOKENIZER)


def batches(processor, count: int = 4, **options):
    loader = make_loader(DataConfig(seq_len=256, batch_size=2, prefetch=0, **options), processor)
    found = [next(loader) for _ in range(count)]
    loader.close()
    return found


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def table_of(rows):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.Table.from_pylist(rows)


PLAIN = [{"messages": row["messages"]} for row in CHATS if not row.get("tools")]
"""Columns are of one type, which the arguments of different tools are not."""


def test_parquet_is_read_as_the_same_rows_in_json(tmp_path, processor):
    pq = pytest.importorskip("pyarrow.parquet")
    assert len(PLAIN) > 20
    pq.write_table(table_of(PLAIN[:15]), tmp_path / "a-0.parquet", row_group_size=4)
    pq.write_table(table_of(PLAIN[15:]), tmp_path / "a-1.parquet")
    rows = open_rows([str(tmp_path / "a-*.parquet")])
    assert [json.loads(row.data) for row in rows] == PLAIN
    assert rows[16].where == f"{tmp_path / 'a-1.parquet'}:2"
    assert json.loads(rows[3].data) == PLAIN[3]
    lines = jsonl(tmp_path / "a.jsonl", PLAIN)
    assert_same(batches(processor, paths=lines), batches(processor, paths=str(tmp_path / "a-*.parquet")))


def test_keys_without_a_value_are_left_out_and_bytes_are_refused(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    mixed = [{"text": "a", "tags": [{"x": 1}, {"y": 2}]}, {"text": "b"}]
    pq.write_table(table_of(mixed), tmp_path / "b.parquet")
    assert [json.loads(row.data) for row in open_rows([str(tmp_path / "b.parquet")])] == mixed
    pq.write_table(table_of([{"picture": b"123"}]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="holds bytes"):
        open_rows([str(tmp_path / "c.parquet")])
    (tmp_path / "d.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read as a table"):
        open_rows([str(tmp_path / "d.parquet")])


def test_a_directory_that_datasets_saved(tmp_path, processor):
    """Its layout written by hand: Arrow streams named by state.json, splits in directories of their own."""
    pyarrow = pytest.importorskip("pyarrow")
    split = tmp_path / "saved" / "train"
    split.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    names = []
    for number, rows in enumerate((PLAIN[:7], PLAIN[7:])):
        table = table_of(rows)
        names.append({"filename": f"data-{number:05}-of-00002.arrow"})
        with pyarrow.ipc.new_stream(str(split / names[-1]["filename"]), table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    (split / "state.json").write_text(json.dumps({"_data_files": names}))
    assert [json.loads(row.data) for row in open_rows([str(split)])] == PLAIN
    assert_same(batches(processor, paths=str(split)), batches(processor, paths=jsonl(tmp_path / "a.jsonl", PLAIN)))
    with pytest.raises(UserError, match=r"several splits; name one of them: .*saved/train or .*saved/test"):
        open_rows([str(tmp_path / "saved")])
    with pytest.raises(UserError, match=r"did not save; name its files, for example .*/\*\.jsonl"):
        open_rows([str(tmp_path)])
    (split / "state.json").write_text(json.dumps({"_data_files": names, "_indices_files": [{"filename": "i"}]}))
    with pytest.raises(UserError, match="flatten_indices"):
        open_rows([str(split)])


def test_array_records_are_read_where_they_lie(tmp_path, processor):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.arrayrecord"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for row in CHATS:
        writer.write(json.dumps(row).encode())
    writer.close()
    rows = open_rows([str(path)])
    assert [json.loads(row.data) for row in rows] == CHATS
    assert_same(batches(processor, paths=str(path)), batches(processor, paths=jsonl(tmp_path / "a.jsonl", CHATS)))


def texts(tmp_path, counts=(10, 100)) -> list[str]:
    """Files of rows that are one recognisable token each."""
    words = ["apple", "moon"]
    return [
        jsonl(tmp_path / f"{word}.jsonl", [{"text": word}] * count) for word, count in zip(words, counts, strict=True)
    ]


def test_a_mixture_reads_as_much_of_each_path_as_its_weight_says(tmp_path, processor):
    options = {"paths": tuple(texts(tmp_path)), "kind": "text", "weights": (3.0, 1.0), "seq_len": 64, "packing": False}
    loader = make_loader(DataConfig(batch_size=11, prefetch=0, epochs=1, **options), processor)
    first = {int(processor.tokenizer.encode(word)[0]): word for word in ("apple", "moon")}
    seen = Counter(first[int(token)] for batch in loader for token in batch["targets"][:, 0])
    loader.close()
    assert sum(seen.values()) == 110  # an epoch is as many rows as there are
    assert abs(seen["apple"] - 82.5) <= 1
    assert "75.0%; 10 rows, each 8.25 times an epoch" in loader.summary.table()
    for weights in ((1.0,), (1.0, 0.0)):
        with pytest.raises(UserError, match=r"data\.weights wants a number above 0 for each of the 2"):
            DataConfig(**{**options, "weights": weights})


def test_a_mixture_resumes_exactly_and_on_other_numbers_of_processes(tmp_path, processor):
    paths = (jsonl(tmp_path / "a.jsonl", CHATS[:20]), jsonl(tmp_path / "b.jsonl", CHATS[20:]))
    config = DataConfig(paths=paths, weights=(1.0, 2.0), seq_len=256, batch_size=2, pack_window=16, prefetch=0)
    loader = make_loader(config, processor)
    for _ in range(5):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    wanted = [next(loader) for _ in range(12)]  # over the end of an epoch
    again = make_loader(config, processor)
    again.restore(state)
    assert_same(wanted, [next(again) for _ in range(12)])
    halves = [make_loader(config, processor, process_index=index, process_count=2) for index in range(2)]
    for half in halves:
        half.restore(state)
    for batch in wanted[:3]:
        parts = [next(half) for half in halves]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
    other = make_loader(
        DataConfig(paths=paths, weights=(1.0, 3.0), seq_len=256, batch_size=2, pack_window=16, prefetch=0), processor
    )
    with pytest.raises(UserError, match="mixture was"):
        other.restore(state)


def test_the_command_shows_examples_with_what_is_trained_and_statistics(tmp_path, capsys, processor):
    path = jsonl(tmp_path / "a.jsonl", [*CHATS[:8], {"messages": []}])
    assert data.main([path, "--seq_len=256", "--examples=2"]) == 0
    out = capsys.readouterr().out
    shown = out[out.index("\n") + 1 : out.index("row 2:")].strip()
    bare = shown.replace("⟦", "").replace("⟧", "")
    example = processor.encode(CHATS[0]["messages"], CHATS[0].get("tools"))
    assert processor.decode(example.tokens.tolist()).startswith(bare)
    trained = processor.decode(example.tokens[example.loss_mask].tolist())
    assert "".join(part.split("⟧")[0] for part in shown.split("⟦")[1:]) == trained
    assert "9 (all checked)" in out
    assert "skipped    1 of 9 checked rows" in out
    assert "median" in out
    assert data.main([path, "--examples=1", "--tokens"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "trained  " in line]
    assert len(lines) == int(example.loss_mask.sum())
    assert data.main([path, "--examples=1", "--colour=always"]) == 0
    assert "\033[32" in capsys.readouterr().out
    assert data.main([str(tmp_path / "no.jsonl")]) == 1
    assert "There is no data file" in capsys.readouterr().err

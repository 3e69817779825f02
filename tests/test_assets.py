"""The embedded tokenizer and data set: made by their scripts, disjoint, valid, small, and right about the special ids."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from gemma4_jax.assets import HELDOUT, TOKENIZER, TRAIN, make_data, make_tokenizer

REAL_TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer_gemma4.model"
IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "\n": 107,
    "\n\n": 108,
}
SPECIAL = 118  # ids below are not learnt


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_data_script_reproduces_the_committed_files() -> None:
    train, heldout = make_data.build()
    assert make_data.to_jsonl(train) == TRAIN.read_bytes()
    assert make_data.to_jsonl(heldout) == HELDOUT.read_bytes()


def test_another_seed_gives_other_rows() -> None:
    assert make_data.to_jsonl(make_data.build(seed=make_data.SEED + 1)[1]) != HELDOUT.read_bytes()


def test_tokenizer_script_reproduces_the_committed_model(pieces: sentencepiece.SentencePieceProcessor) -> None:
    made = make_tokenizer.build()
    if sentencepiece.__version__ == make_tokenizer.MADE_WITH:
        assert made == TOKENIZER.read_bytes()
    remade = sentencepiece.SentencePieceProcessor(model_proto=made)
    expected = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    assert [(remade.id_to_piece(i), remade.get_score(i)) for i in range(remade.vocab_size())] == expected


def test_files_are_small() -> None:
    assert TRAIN.stat().st_size <= 1_500_000
    assert HELDOUT.stat().st_size <= 100_000
    assert TOKENIZER.stat().st_size <= 60_000


def test_special_ids_are_those_of_gemma_4(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert {piece: pieces.piece_to_id(piece) for piece in IDS} == IDS
    assert pieces.vocab_size() == make_tokenizer.VOCAB_SIZE
    assert pieces.vocab_size() % 128 == 0


def test_first_pieces_equal_the_real_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> None:
    if not REAL_TOKENIZER.exists():
        pytest.skip(f"{REAL_TOKENIZER.name} is not beside the checkout")
    real = sentencepiece.SentencePieceProcessor(model_file=str(REAL_TOKENIZER))
    assert [pieces.id_to_piece(i) for i in range(111)] == [real.id_to_piece(i) for i in range(111)]


def test_marked_up_text_encodes_to_special_ids(pieces: sentencepiece.SentencePieceProcessor) -> None:
    ids = pieces.encode('<|turn>user\nx<turn|>\n<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><|image|>')
    assert [i for i in ids if i < SPECIAL] == [105, 107, 106, 107, 48, 52, 52, 49, 112]


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two  spaces and a tab\t.",
        "\n\nlines\n",
        "naïve 世界 🙂",
        "1234 + 5.6",
        "{'a': [\"b\"]} ~`|\\",
        "",
    ],
)
def test_any_text_round_trips(pieces: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert 3 not in ids


def test_digits_and_spaces_as_in_gemma(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.encode("2048", out_type=str) == ["2", "0", "4", "8"]
    assert not pieces.encode("word", out_type=str)[0].startswith("▁")


def test_copied_words_are_one_piece_wherever_they_stand(pieces: sentencepiece.SentencePieceProcessor) -> None:
    for word in make_tokenizer.COPIED:
        assert pieces.encode(word, out_type=str) == [word]
        assert pieces.encode(f"a {word}.", out_type=str) == ["a", "▁", word, "."]
        assert pieces.encode(f'<|"|>{word}<|"|>', out_type=str) == ['<|"|>', word, '<|"|>']


def test_heldout_prompts_are_unseen_and_distinct() -> None:
    train = [make_data.prompt_of(row) for row in rows_of(TRAIN)]
    heldout = [make_data.prompt_of(row) for row in rows_of(HELDOUT)]
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_every_task_is_there_and_a_quarter_uses_tools(path: Path) -> None:
    rows = rows_of(path)
    counts = Counter(row["task"] for row in rows)
    column = 1 if path == TRAIN else 2
    assert counts == {task: numbers[column] for task, numbers in make_data.TASKS.items()}
    assert sum("tools" in row for row in rows) >= len(rows) / 4


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_rows_are_valid_conversations(path: Path) -> None:
    for row in rows_of(path):
        assert set(row) <= {"task", "messages", "tools"}
        messages = row["messages"]
        assert messages[0]["role"] == "user"
        assert messages[-1]["role"] == "assistant"
        declared = {each["function"]["name"]: each["function"]["parameters"] for each in row.get("tools", ())}
        for message in messages:
            assert message["role"] in {"user", "assistant", "tool"}
            assert bool(message["content"]) != bool(message.get("tool_calls"))
            for call in message.get("tool_calls", ()):
                parameters = declared[call["function"]["name"]]
                arguments = call["function"]["arguments"]
                assert set(arguments) == set(parameters["required"]) == set(parameters["properties"])
                for name, value in arguments.items():
                    assert isinstance(value, {"string": str, "integer": int}[parameters["properties"][name]["type"]])


def test_answers_follow_the_rules() -> None:
    """The rules, stated a second time and read off the text of each held-out row."""
    checked = Counter()
    for row in rows_of(HELDOUT):
        task, question, expected = row["task"], row["messages"][0]["content"], row["messages"][-1]
        listed = question.rstrip(".?").rpartition(": ")[2].split(" ")
        if task == "pick":
            places = {"first": 0, "second": 1, "third": 2, "last": -1}
            asked = [places[word] for word in question.partition(" word")[0].split(" ") if word in places]
            assert expected["content"].split(" ") == [listed[place] for place in asked]
        elif task == "reverse":
            assert expected["content"].split(" ") == listed[::-1]
        elif task == "sort":
            assert expected["content"].split(" ") == sorted(listed, reverse="high to low" in question)
        elif task == "add":
            assert int(expected["content"]) == sum(int(word) for word in question.split() if word.isdigit())
        elif task == "json":
            record = json.loads(expected["content"])
            assert list(record) == question.rstrip("?").rpartition("with ")[2].split(" and ")
            assert all(str(value) in question for value in record.values())
        elif task == "tool_call":
            arguments = expected["tool_calls"][0]["function"]["arguments"]
            assert all(str(value) in question for value in arguments.values())
        elif task == "tool_answer":
            numbers = [word for word in row["messages"][2]["content"].split() if word.isdigit()]
            assert numbers
            assert all(number in expected["content"] for number in numbers)
        checked[task] += 1
    assert set(checked) == set(make_data.TASKS)

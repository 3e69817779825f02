"""Likelihoods of continuations against NumPy, and lm-evaluation-harness on a task of five questions."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax import assets
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.eval.likelihood import continuation_scores
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import abstract
from launch import harness

SMALL = dict(vocab_size=896, hidden_size=64, layer_period=2, num_hidden_layers=2, sliding_window=8)


def model_of(seed: int = 0):
    rng = np.random.default_rng(seed)
    model = abstract(ModelConfig.variant("tiny_31b", **SMALL))
    return map_arrays(lambda _, v: jnp.asarray(rng.normal(0, 0.2, v.get_value().shape), jnp.float32), model)


@quick.jit
def all_logits(model, tokens):
    return model(tokens)


def logits_of(model, ids: list[int]) -> np.ndarray:
    """What is behind them changes nothing: one program for all lengths."""
    padded = jnp.asarray([[*ids, *[0] * (48 - len(ids))]], jnp.int32)
    return np.asarray(all_logits(model, padded), np.float64)[0, : len(ids)]


def by_hand(model, ids: list[int], start: int) -> tuple[float, bool]:
    logits = logits_of(model, ids)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(ids)[start:]
    rows = logp[start - 1 : len(ids) - 1]
    return float(rows[np.arange(len(targets)), targets].sum()), bool((rows.argmax(-1) == targets).all())


def test_continuations_of_any_length_in_batches():
    model, rng = model_of(), np.random.default_rng(1)
    sequences = [
        (rng.integers(3, 320, size).tolist(), start) for size, start in ((5, 1), (40, 37), (9, 8), (2, 1), (31, 4))
    ]
    greedy = [2, 7]
    for _ in range(3):  # one that the model itself would write
        greedy.append(int(logits_of(model, greedy)[-1].argmax()))
    sequences.append((greedy, 2))
    found = continuation_scores(model, sequences, batch_size=4)
    for (ids, start), (logprob, likeliest) in zip(sequences, found, strict=True):
        wanted, is_greedy = by_hand(model, ids, start)
        assert logprob == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert likeliest == is_greedy
    assert found[-1][1]


QUESTIONS = [
    {"question": f"Which comes after {a}?", "choices": [b, c], "answer": 0}
    for a, b, c in (
        ("one", "two", "moon"),
        ("two", "three", "ship"),
        ("red", "sea", "tree"),
        ("a", "b", "c"),
        ("x", "y", "z"),
    )
]
TASKS = {
    "choice": """task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "words": """task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match}]
""",
}


def test_a_local_task_of_the_harness(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = model_of()
    save_model(model, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(tmp_path / "rows.jsonl")))
    common = ["--model", str(tmp_path / "model"), "--tokenizer", str(assets.TOKENIZER), "--include_path", str(tmp_path)]
    options = [*common, "--dtype", "float32", "--output", str(tmp_path / "out.json")]
    assert harness.main([*options, "--tasks", "tiny_choice", "tiny_words"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    from gemma4_jax.processor import Processor

    processor = Processor.load(assets.TOKENIZER)
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            ids = [2, *processor.tokenizer.encode(f"{row['question']} {choice}")]
            scores.append(by_hand(model, ids, 1 + len(processor.tokenizer.encode(row["question"])))[0])
        right += int(np.argmax(scores) == row["answer"])
    assert found["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert "exact_match,none" in found["tiny_words"]
    assert "tiny_choice" in capsys.readouterr().out

"""A teacher's answers on disk: what is kept, who may read it, and a QAT run that goes by it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.kernels.cross_entropy import Likeliest
from gemma4_jax.model.transformer import init
from gemma4_jax.train.teaching import Answers, ask, likeliest, rows_of
from launch.run import main

K, B, T, V = 5, 2, 12, 64
SIZES = dict(hidden_size=64, intermediate_size=64, head_dim=32, global_head_dim=32, sliding_window=16)


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(3, V, (B, T)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "segment_ids": np.ones((B, T), np.int32),
        "targets": rng.integers(3, V, (B, T)).astype(np.int32),
        "loss_weights": (rng.random((B, T)) < 0.5).astype(np.float32),
    }


def said(seed: int) -> Likeliest:
    logits = np.random.default_rng(seed).standard_normal((B, T, K + 1)).astype(np.float32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return Likeliest(np.random.default_rng(seed).integers(0, V, (B, T, K)), log_p)


def opened(directory: Path, **about) -> Answers:
    return Answers(directory, {"digest": "one", **about}, top_k=K)


def test_answers_come_back_for_their_rows(tmp_path):
    answers, batches = opened(tmp_path / "kept"), [batch(0), batch(1)]
    for seed, each in enumerate(batches):
        answers.add(rows_of(each), said(seed), each["loss_weights"] > 0)
    for reader in (answers, opened(tmp_path / "kept", teacher="elsewhere now")):
        for seed, each in enumerate(batches):
            rows, trained = rows_of(each)[::-1], each["loss_weights"][::-1] > 0  # in another order
            found, wanted = reader.read(rows, trained), said(seed)
            np.testing.assert_array_equal(found.ids[trained], wanted.ids[::-1][trained])
            np.testing.assert_allclose(found.log_p[trained], wanted.log_p[::-1][trained], atol=4e-3)
            np.testing.assert_allclose(np.exp(found.log_p).sum(-1), 1, rtol=1e-6)
    with pytest.raises(UserError, match="no answer of the teacher to a row"):
        answers.read(rows_of(batch(2)), trained)
    moved = {**batches[0], "loss_weights": np.roll(batches[0]["loss_weights"], 1, axis=1)}  # as many, but others
    with pytest.raises(UserError, match="no answer of the teacher to a row"):
        answers.read(rows_of(moved), moved["loss_weights"] > 0)
    with pytest.raises(UserError, match="another teacher: digest 'one' there and 'two' here"):
        opened(tmp_path / "kept", digest="two")
    with pytest.raises(UserError, match="pictures or sounds"):
        rows_of({**batch(0), "media": object()})


def test_a_killed_writer_is_continued(tmp_path):
    first, second = batch(0), batch(1)
    opened(tmp_path).add(rows_of(first), said(0), first["loss_weights"] > 0)
    for name in ("answers-00000.bin", "rows-00000.bin"):  # the beginning of another answer
        with (tmp_path / name).open("ab") as file:
            file.write(b"\x01" * 13)
    answers = opened(tmp_path)
    answers.add(rows_of(second), said(1), second["loss_weights"] > 0)
    for seed, each in enumerate((first, second)):
        trained = each["loss_weights"] > 0
        found = opened(tmp_path).read(rows_of(each), trained)
        np.testing.assert_array_equal(found.ids[trained], said(seed).ids[trained])


def test_answers_that_were_lost_are_asked_for_again(tmp_path):
    """The index reached the disk and the end of the answers did not."""
    first = batch(0)
    opened(tmp_path).add(rows_of(first), said(0), first["loss_weights"] > 0)
    path = tmp_path / "answers-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    answers = opened(tmp_path)
    assert [row in answers for row in rows_of(first)] == [True, False]
    answers.add(rows_of(first), said(0), first["loss_weights"] > 0)
    found = opened(tmp_path).read(rows_of(first), first["loss_weights"] > 0)
    np.testing.assert_array_equal(found.ids[first["loss_weights"] > 0], said(0).ids[first["loss_weights"] > 0])


def test_the_teacher_is_asked_once_and_its_likeliest_are_kept(tmp_path):
    teacher = init(ModelConfig.variant("tiny_31b", vocab_size=V, num_hidden_layers=6, **SIZES), 3)
    answers, batches, said, made = opened(tmp_path), [batch(0), batch(1), batch(0)], [], []

    def make_teacher():
        made.append(teacher)
        return teacher

    ask(answers, make_teacher, iter(batches), 3, said.append)
    ask(opened(tmp_path), make_teacher, iter(batches), 3, said.append)
    assert len(made) == 1
    assert "3 batches, 1 of them answered before" in said[1]
    assert "3 batches, 3 of them answered before" in said[2]
    trained = batches[0]["loss_weights"] > 0
    found = answers.read(rows_of(batches[0]), trained)
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(teacher, batches[0]["tokens"]), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.sort(p, -1)[..., ::-1][..., :K]
    np.testing.assert_allclose(np.exp(found.log_p[..., :K])[trained], wanted[trained], rtol=5e-3)
    np.testing.assert_array_equal(np.take_along_axis(p, found.ids, -1)[trained], wanted[trained])
    np.testing.assert_allclose(np.exp(found.log_p[..., K])[trained], 1 - wanted.sum(-1)[trained], rtol=5e-3)
    np.testing.assert_allclose(np.asarray(likeliest(teacher, batches[0], V).log_p[..., V]), np.log(1e-6), rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_by_the_answers_of_its_teacher(tmp_path, capsys):
    """The loss is that of the run with the teacher beside it, nearly: all tokens but one are kept; then nobody asks again."""
    depth = dict(num_hidden_layers=10, num_kv_shared_layers=5)
    cfg = ModelConfig.variant("tiny_e2b", **SIZES, **depth)
    save_model(init(cfg), tmp_path / "float")
    common = [
        *("--config=configs/tiny_qat.py", f"--config.model.path={tmp_path / 'float'}", "--config.mesh.devices=1"),
        *(
            "--config.data.seq_len=96",
            "--config.data.batch_size=2",
            "--config.eval_data=none",
            "--config.train.steps=3",
        ),
        *("--config.train.log_every=1", "--config.optim.warmup_steps=0", "--config.quant.distill_weight=1.0"),
        "--config.train.grad_accum=2",
    ]
    kept = [f"--config.quant.teacher_cache={tmp_path / 'kept'}", f"--config.quant.teacher_top_k={cfg.vocab_size - 1}"]

    def run(name: str, *options: str) -> tuple[list[float], str]:
        assert main([*common, *options, f"--config.workdir={tmp_path / name}"]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/kl"] for row in rows if "train/kl" in row], capsys.readouterr().out

    beside, _ = run("beside")
    first, said = run("first", *kept)
    assert "asking the teacher about 3 batches" in said
    np.testing.assert_allclose(first, beside, rtol=0.01)
    assert min(first) > 0
    again, said = run("again", *kept)
    assert "3 batches, 3 of them answered before" in said
    assert again == first
    assert main([*common, *kept, "--config.quant.teacher_top_k=9", f"--config.workdir={tmp_path / 'third'}"]) == 1
    assert f"another teacher: top_k {cfg.vocab_size - 1} there and 9 here" in capsys.readouterr().err

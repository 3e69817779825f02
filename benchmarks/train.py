"""The time of an SFT step, forward, backward and AdamW in float32, beside peers on the same weights and tokens."""

import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import keep
from benchmarks.worker import Answer, worker
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.eval.report import table
from gemma4_jax.model.transformer import init
from gemma4_jax.train.metrics import si

_BOTH = dict(vocab_size=32768, hidden_size=768, num_hidden_layers=12, head_dim=128, global_head_dim=256)
_DENSE = dict(intermediate_size=3072, num_kv_shared_layers=6, hidden_size_per_layer_input=64)
_HEADS = dict(num_attention_heads=8, num_key_value_heads=4, sliding_window=512)
_EXPERTS = dict(intermediate_size=768, num_experts=32, top_k_experts=8, moe_intermediate_size=96)
MODELS = {"dense": ("e4b", _BOTH | _DENSE), "moe": ("26b_a4b", _BOTH | _HEADS | _EXPERTS)}
"""A variant and what makes it small: 112 and 137 million parameters beside the embeddings."""
_QUICK = dict(vocab_size=512, hidden_size=64, head_dim=16, global_head_dim=32, sliding_window=16)
PEERS = {
    "transformers": "benchmarks.peer_transformers",
    "tunix": "benchmarks.peer_tunix",
    "gemma": "benchmarks.peer_gemma",
}
"""What a peer is called on the command line, and its side."""
ROWS = 2
"""Of 512 tokens. Four sides at once do not fit in 24 GB: one peer at a time."""
TOLERANCE = {"dense": 1e-4, "moe": 1e-3}
"""Relative difference of the first losses: rounding gives about 1e-7, another model or batch 1e-2. Where a router with random
weights finds two experts nearly equal, rounding decides: transformers in float64 says 10.8769 for a row of `moe`, in float32
10.8757, Tunix and gemma 10.8748, we 10.8768."""


def compare(names: list[str], *, quick: bool, steps: int, rows: int, peers: dict[str, Path], save: bool) -> None:
    """Prints one table and the ratios to each peer (name -> its Python); UserError if two sides differ in their loss."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    busy = "; TOO BUSY for the numbers to mean much" * (load > 0.75 * cores)
    print(f"{cores} cores, load average {load:.2f}{busy}", flush=True)
    sides = {"gemma4_jax": (sys.executable, "benchmarks.ours")}
    sides |= {name: (str(python.absolute()), PEERS[name]) for name, python in peers.items()}
    records, notes = [], []
    for name in names:
        command = f"python -m benchmarks{' --quick' * quick} --models {name} --steps {steps}"
        command += f" --rows {rows}" * (rows != ROWS)
        command += "".join(f" --peer {peer}=PYTHON" for peer in peers)
        measured = _measure(name, quick, steps, rows, sides)
        found = [{"by": by, "command": command, **record} for by, record in measured.items()]
        ours, *others = found
        ratios = [f"{other['median_s'] / ours['median_s']:.2f} times as fast as {other['by']}" for other in others]
        notes.append(f"{name}: {', '.join(ratios) or 'not compared'}; {command}")
        records += found
    notes += dict.fromkeys(f"{record['by']}: {record['version']}" for record in records)
    header = ("model", "parameters", "by", "median s", "best s", "tokens/s", "first s", "first loss", "last loss", "GB")
    print(table(header, [_row(record) for record in records]), *notes, sep="\n")
    if save:
        keep.save("train_quick" if quick else "train", records, load)


def _measure(name: str, quick: bool, steps: int, rows: int, sides: dict[str, tuple[str, str]]) -> dict[str, Answer]:
    """A record for each side. The first step compiles and is compared, not timed with the others.

    Steps come in pairs, and the second is timed. While the other side works, a side's freed memory goes back to the
    system, on a virtual machine to its host, and the next step fetches it again, page by page: that made a step of ours take 7 s
    which takes 4 s in training, where steps follow each other (dense, 2 cores).
    """
    variant, sizes = MODELS[name]
    cfg = ModelConfig.variant(variant, **sizes | (_QUICK if quick else {}))
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (rows, 64 if quick else 512), np.int32)
    with contextlib.ExitStack() as stack:
        checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_hf(init(cfg), checkpoint, dtype="float32")
        np.save(checkpoint / "tokens.npy", tokens)
        step = {by: stack.enter_context(worker(*side, checkpoint)) for by, side in sides.items()}
        answers = {by: [step[by]()] for by in sides}
        losses = {by: first["loss"] for by, (first,) in answers.items()}
        ours = losses["gemma4_jax"]
        for by, loss in losses.items():
            if not abs(ours - loss) <= TOLERANCE[name] * abs(loss):  # NaN fails too
                raise UserError(
                    f"{name}: the first loss is {ours:.6f} here and {loss:.6f} in {by}; it must be the same."
                )
        for turn in range(steps):
            for by in list(sides)[:: 1 if turn % 2 else -1]:
                step[by]()
                answers[by].append(step[by]())
    return {by: {"model": name, "tokens": tokens.size, **_summary(found)} for by, found in answers.items()}


def _summary(answers: list[Answer]) -> Answer:
    first, *seconds = [answer["seconds"] for answer in answers]
    losses = [answer["loss"] for answer in answers]
    facts = {key: answers[-1][key] for key in ("version", "parameters", "peak_gb")}
    return facts | {"median_s": statistics.median(seconds), "first_s": first, "seconds": seconds, "losses": losses}


def _row(record: Answer) -> tuple:
    median, first, best, losses = record["median_s"], record["first_s"], min(record["seconds"]), record["losses"]
    times = (f"{median:.3f}", f"{best:.3f}", f"{record['tokens'] / median:,.0f}", f"{first:.1f}")
    peak = record["peak_gb"] and f"{record['peak_gb']:.2f}"
    both = (f"{losses[0]:.6f}", f"{losses[-1]:.6f}")
    return record["model"], si(record["parameters"]), record["by"], *times, *both, peak

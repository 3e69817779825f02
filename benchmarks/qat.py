"""What fake quantisation adds to a training step: `python -m benchmarks.qat`, QAT without a teacher beside SFT, in one process.

Both have the same weights and tokens and AdamW in float32 and take turns, the order changing; a ratio is one of medians. Memory
is what XLA allocates for the compiled step: arguments (state and batch), results beside them, temporaries.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.train import MODELS
from gemma4_jax.config import ModelConfig
from gemma4_jax.eval.report import table
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.quant import policy
from gemma4_jax.quant.policies import POLICIES
from gemma4_jax.train.calibration import calibrate
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step

_SMALL = dict(vocab_size=8192, hidden_size=512, head_dim=64, global_head_dim=128)
REMAT = ("none", "full")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat", description="QAT steps beside SFT steps.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--policy", choices=POLICIES, default="q4_0")
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=list(REMAT), help="default: all")
    parser.add_argument("--small", action="store_true", help="a third of the width, a quarter of the vocabulary")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each")
    parser.add_argument("--tokens", type=int, nargs=2, default=(2, 512), metavar=("ROWS", "LENGTH"))
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}", flush=True)
    rows = []
    for name in options.models:
        variant, sizes = MODELS[name]
        cfg = ModelConfig.variant(variant, **sizes | (_SMALL if options.small else {}))
        batch = batch_of(cfg.vocab_size, *options.tokens)
        for remat in options.remat:
            rows.append((name, remat, *compare(cfg, options.policy, remat, batch, options.steps)))
            print(*rows[-1], flush=True)
    header = ("model", "remat", "SFT s", "QAT s", "time", "SFT GB", "QAT GB", "memory")
    print(table(header, rows))


def compare(cfg: ModelConfig, name: Any, remat: str, batch, steps: int) -> tuple:
    """Medians, peaks and their ratios of SFT and of QAT with the policy of that name."""
    model = init(cfg)
    quantised = policy.apply(model, policy.QuantConfig(policy=name))
    quantised = calibrate(quantised, iter([batch]), 1, remat=remat)
    sides = [side(model, remat, batch), side(quantised, remat, batch)]
    del model, quantised
    seconds: list[list[float]] = [[], []]
    for turn in range(steps + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            sides[which][0]()
            if turn:  # the first fills caches and fetches memory
                seconds[which].append(time.perf_counter() - began)
    sft, qat = (statistics.median(times) for times in seconds)
    (_, small), (_, large) = sides
    return f"{sft:.3f}", f"{qat:.3f}", f"{qat / sft:.3f}", f"{small:.3f}", f"{large:.3f}", f"{large / small:.3f}"


def side(model: Transformer, remat: str, batch) -> tuple[Callable[[], None], float]:
    """A function that takes one step, and the GB the step allocates."""
    config = OptimConfig(learning_rate=1e-5, schedule="constant", clip_norm=None)
    optim = optimizer(config, steps=1)
    state = TrainState.create(model, optim, config.freeze)
    compiled = make_train_step(model, optim, remat=remat).lower(state, batch, None).compile()
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    size += memory.temp_size_in_bytes

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch, None))

    return step, size / 1e9


def batch_of(vocabulary: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, all trained."""
    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length)).astype(np.int32)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape))
    ones = np.ones_like(tokens)
    targets = np.roll(tokens, -1, axis=1)
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": ones,
        "targets": targets,
        "loss_weights": ones.astype(np.float32),
    }


if __name__ == "__main__":
    main()

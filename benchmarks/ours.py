"""Our side, `python -m benchmarks.ours CHECKPOINT`: a step for every line of stdin, built as in launch/training.py."""

import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.worker import serve
from gemma4_jax.checkpoint.hf import load_hf
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step


def main(checkpoint: Path) -> None:
    """float32, nothing recomputed; AdamW at a constant rate without clipping or decay."""
    model = load_hf(checkpoint, dtype="float32")
    config = OptimConfig(learning_rate=1e-5, schedule="constant", b2=0.999, clip_norm=None)
    optim = optimizer(config, steps=1)
    state = TrainState.create(model, optim, config.freeze)
    train_step = make_train_step(model, optim)
    tokens = np.load(checkpoint / "tokens.npy")
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones_like(tokens),
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": (positions < tokens.shape[1] - 1).astype(np.float32),  # a row's last token has no successor
    }

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batch, None))
        return float(metrics["loss"])

    size = sum(value.size for value in state.params.values())
    serve({"version": f"jax {jax.__version__}", "parameters": size}, step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

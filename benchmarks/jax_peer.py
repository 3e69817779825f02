"""What the sides of JAX peers share: training (their loss, AdamW from Optax as on our side, a donated state) and answering."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.worker import peak_gb, serve


def train(logits: Callable[[Any], jax.Array], params: Any, tokens: jax.Array, version: str) -> None:
    """Serves training steps: the mean cross-entropy of `logits(params)` [B, T, V] on tokens [B, T], each telling the next."""
    optimizer = optax.adamw(1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    state = params, optimizer.init(params)

    def loss(params):
        log_p = jax.nn.log_softmax(logits(params)[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    @jax.jit(donate_argnums=0)
    def train_step(state):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def step() -> float:
        nonlocal state
        state, value = jax.block_until_ready(train_step(state))
        return float(value)

    size = sum(x.size for x in jax.tree.leaves(params))
    serve({"version": f"{version}, jax {jax.__version__}", "parameters": size}, step)


class Asked(NamedTuple):
    """Seconds of a prefill, up to the first token and of a decoding step; tokens [B, new]; bytes of the cache."""

    prefill_s: float
    first_token_s: float
    step_s: float
    tokens: list[list[int]]
    cache_bytes: int


def answer(checkpoint: Path, ask: Callable[[np.ndarray, int], Asked], version: str) -> None:
    """Serves the measures of benchmarks/inference.py; `ask(tokens [B, T], new)` reads prompts and writes `new` tokens each."""
    prompts = np.load(checkpoint / "prompts.npz")
    new = int(prompts["new"])
    for _ in sys.stdin:
        long, one, eight = (
            ask(prompts[name], count) for name, count in (("prefill", 1), ("decode1", new + 1), ("decode8", new + 1))
        )
        times = {"prefill_s": long.prefill_s, "first_token_s": long.first_token_s}
        times |= {"decode1_s": one.step_s, "decode8_s": eight.step_s}
        facts = {"version": f"{version}, jax {jax.__version__}", "cache_bytes": long.cache_bytes, "peak_gb": peak_gb()}
        print(json.dumps({**facts, **times, "tokens": one.tokens + eight.tokens}), flush=True)

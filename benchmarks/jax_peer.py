"""What the sides of JAX peers share: their loss, AdamW from Optax as on our side, one jitted step with a donated state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.worker import serve


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

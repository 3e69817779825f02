"""The drafter against transformers' numbers over every cache layout, its config and its files.

Fixtures: tests/golden/drafters.py.
"""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.checkpoint.drafter import load_drafter
from gemma4_jax.checkpoint.load import load
from gemma4_jax.model.decode import view_of
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.kv import producers
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
TARGETS = {"drafter_31b": "tiny_31b", "drafter_e2b": "tiny_e2b"}
STEPS, DRAFTS = 3, 4
TOLERANCE = 1e-3  # that of the targets' own fixtures: float32 sums in another order


@functools.cache
def target_of(name: str) -> Transformer:
    return load(GOLDEN / TARGETS[name], dtype="float32", text_only=True)


@functools.partial(quick.jit, static_argnames="layout")
def drafted(target: Transformer, drafter: Drafter, tokens_T, *, layout: str):
    """What the drafter says behind a prompt whose last token the target has not read: logits, ids, hidden of each step."""
    cfg, cache_format = target.cfg, CacheFormat(layout)
    last = tokens_T.shape[0] - 1
    positions = jnp.arange(last, dtype=jnp.int32)[None]
    h, cache = target.prefill(tokens_T[None, :-1], positions, 64, DRAFTS + 2, cache_format)
    views = {}
    for kind, index in producers(cfg).items():
        stack = target.own
        layer = stack.full if kind == "full" else stack.sliding
        last_block = -1 if kind == "full" else (-1, -1)
        import jax

        layer = jax.tree.map(lambda x, at=last_block: x[at], layer)
        views[kind] = view_of(layer, cfg, cache_format, cache.layers[index], cache.positions[kind])
    token, hidden, found = tokens_T[last:], h[:, -1], []
    for _ in range(STEPS):
        state, hidden = drafter.step(
            target.embed.lookup(token[None], "float32")[0], hidden, jnp.full(1, last, jnp.int32), views
        )
        logits, ids = drafter.scores(state)
        place = logits.argmax(axis=-1)
        token = place.astype(jnp.int32) if ids is None else ids[0, place]
        found.append((logits[0], None if ids is None else ids[0], hidden[0], token))
    return found


@pytest.mark.parametrize(
    ("name", "layout"),
    [("drafter_31b", "plain"), ("drafter_31b", "unified"), ("drafter_31b", "rotate_on_read"), ("drafter_e2b", "plain")],
)
def test_the_drafter_says_what_transformers_says(name: str, layout: str):
    drafter = load_drafter(GOLDEN / name, dtype="float32")
    assert (drafter.centroids is not None) == (name == "drafter_e2b")
    with np.load(GOLDEN / name / "expected.npz") as stored:
        wanted = dict(stored)
    for prompt in range(2):
        want = {key: wanted[f"{prompt}/{key}"] for key in ("tokens", "drafts", "logits", "hidden")}
        for step, (logits, ids, hidden, token) in enumerate(
            drafted(target_of(name), drafter, want["tokens"], layout=layout)
        ):
            assert token[0] == want["drafts"][step]
            np.testing.assert_allclose(hidden, want["hidden"][step], atol=TOLERANCE)
            scored = want["logits"][step]
            if ids is not None:
                # The reference writes one value below the smallest to what is not scored; the smallest itself is drafted by nobody.
                assert ids.size == 80
                assert set(np.flatnonzero(np.isfinite(scored))) == set(np.asarray(ids).tolist())
                scored = scored[np.asarray(ids)]
            np.testing.assert_allclose(logits, scored, atol=TOLERANCE)

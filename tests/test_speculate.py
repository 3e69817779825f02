"""Guessing several tokens at a time changes the speed and nothing else: greedy and drawn, on every structure, whoever guesses."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from test_engine import (
    CHUNK,
    GREEDY,
    HOT,
    LAYERS,
    LENGTH,
    SLOTS,
    WINDOW,
    Only,
    assert_as_forward,
    compilations,
    model_of,
    prompts_of,
    run,
)

from gemma4_jax.config import ModelConfig
from gemma4_jax.config_drafter import DrafterConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer import engine, speculate, steps
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.drafting import Drafting
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.model.drafter import Drafter, abstract_drafter
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer

TOKENS = 4
NEW = 3 * WINDOW + 5


class Scripted(nnx.Module):
    """Guesses by a table: what follows a token at a position. It knows the token by its embedding and the place by counting."""

    def __init__(self, target: Transformer, follows: np.ndarray):
        self.cfg = DrafterConfig.beside(target.cfg, hidden_size=64, intermediate_size=64, num_attention_heads=8)
        self.embed: Embedding = target.embed
        self.follows = nnx.Param(jnp.asarray(follows))

    def step(self, embedded_BD, hidden_BD, position_B, views):
        counted = hidden_BD[:, 0] > 1e5
        ahead = jnp.where(counted, hidden_BD[:, 0] - 1e6, 0.0).astype(jnp.int32)
        token = (embedded_BD @ self.embed.head(embedded_BD.dtype).T).argmax(axis=-1)
        guess = self.follows[...][jnp.clip(position_B + ahead, 0, LENGTH - 1), token]
        return guess[:, None].astype(jnp.float32), hidden_BD * 0 + 1e6 + 1.0 + ahead[:, None].astype(jnp.float32)

    def scores(self, state_BD):
        return 50 * jax.nn.one_hot(state_BD[:, 0].astype(jnp.int32), self.cfg.text.vocab_size), None


def scripted(target: Transformer, answers: list[Running], wrong: float, seed: int = 0) -> Scripted:
    """A drafter that knows these answers, and lies about a share of the places."""
    rng = np.random.default_rng(seed)
    follows = rng.integers(0, target.cfg.vocab_size, (LENGTH, target.cfg.vocab_size))
    for answer in answers:
        whole = [*answer.request.tokens, *answer.tokens]
        for place in range(len(answer.request.tokens) - 1, len(whole) - 1):
            if rng.uniform() >= wrong:
                follows[place, whole[place]] = whole[place + 1]
    return Scripted(target, follows)


@functools.cache
def random_drafter(variant: str, seed: int = 3) -> Drafter:
    """A drafter in which no scale is 1 and no two clusters are alike."""
    rng = np.random.default_rng(seed)
    target = model_of(variant).cfg
    heads = target.num_attention_heads
    cfg = DrafterConfig.beside(
        target,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=heads,
        num_centroids=0 if variant == "tiny_31b" else 16,
        centroid_intermediate_top_k=5,
    )

    def scramble(name, variable):
        shape = variable.get_value().shape
        if name == "token_ordering":
            return jnp.asarray(rng.permutation(target.vocab_size), jnp.int32)
        if name.endswith(".w"):
            return jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)

    return map_arrays(scramble, abstract_drafter(cfg))


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly() -> Iterator[None]:
    """The engine's programs without optimisation: they are nearly all of what this file takes."""
    with pytest.MonkeyPatch.context() as patch:
        draft = dict(static_argnames=("count", "cache_format"), donate_argnames=("cache", "progress"))
        plain = dict(static_argnames=("cache_format",), donate_argnames=("cache", "progress"))
        patch.setattr(engine, "draft_steps", quick.jit(speculate.draft_steps.__wrapped__, **draft))
        patch.setattr(engine, "decode_steps", quick.jit(steps.decode_steps.__wrapped__, **plain))
        yield


def machine_of(variant: str, drafter=None, cache: CacheConfig = CacheConfig(), tokens: int = TOKENS) -> Engine:  # noqa: B008
    sizes = dict(slots=SLOTS, max_length=LENGTH, chunk=CHUNK)
    machine = Engine(model_of(variant), **sizes, cache=cache, drafter=drafter, draft_tokens=tokens)
    machine.reserve(LENGTH)
    return machine


def together_only(machine: Engine) -> Engine:
    """Without the program for one busy slot."""
    machine._write = functools.partial(machine._write, alone=False)
    return machine


def requests_of() -> list[Request]:
    rules = (GREEDY, HOT, GREEDY, HOT, GREEDY)
    prompts = prompts_of((3, WINDOW + 2, 2 * WINDOW, 5, 3 * WINDOW + 6))
    return [Request(p, NEW if i else 9, rule, stream=i) for i, (p, rule) in enumerate(zip(prompts, rules, strict=True))]


def assert_same(got: list[Running], want: list[Running]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one.tokens, one.reason) == (other.tokens, other.reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-4)  # float32 in another order of sums


@pytest.mark.parametrize("variant", LAYERS)
def test_answers_are_the_models_own_whoever_guesses(variant: str, monkeypatch: pytest.MonkeyPatch):
    """Past three windows, greedy and drawn: when no guess holds, when all do, and when rows accept different numbers of them."""
    monkeypatch.setattr(Drafting, "length", lambda self: TOKENS)
    model = model_of(variant)
    machine = together_only(machine_of(variant, scripted(model, [], wrong=1.0)))
    work = machine.drafting
    want = run(machine, requests_of())
    assert work.rate < 0.1
    assert [len(one.tokens) for one in want] == [9, NEW, NEW, NEW, NEW]
    assert_as_forward(model, want)
    if variant == "tiny_31b":
        assert_same(run(together_only(machine_of(variant)), requests_of()), want)
    for wrong, least, most in ((0.0, 0.95, 1.0), (0.25, 0.3, 0.8)):
        work.module = scripted(model, want, wrong)
        work.use(machine._ready())
        work.drafted = work.accepted = work.rounds = work.given = 0
        assert_same(run(machine, requests_of()), want)
        assert least < work.rate <= most
        assert work.tokens_per_pass > (4 if wrong == 0 else 1.5)


@pytest.mark.parametrize(("variant", "cache"), [("tiny_31b", CacheConfig()), ("tiny_e2b", CacheConfig(storage="int8"))])
def test_the_drafter_sees_what_was_accepted_and_nothing_else(variant, cache, monkeypatch: pytest.MonkeyPatch):
    """Its guesses after many rejected ones, far beyond the window, are those from a cache that was never drafted into."""
    monkeypatch.setattr(Drafting, "length", lambda self: TOKENS)
    model, drafter = model_of(variant), random_drafter(variant)
    machine = together_only(machine_of(variant, drafter, cache))
    running = [machine.submit(Request(prompt, 60, GREEDY)) for prompt in prompts_of((5, 20, 41))]
    while len(running[0].tokens) < 45:
        machine.step(soon=True)
    assert machine.drafting.rate < 0.5
    positions = np.asarray(machine._cache.positions["sliding"])
    guess = quick.jit(
        lambda d, drafter, cache, progress: speculate._guesses(
            d, drafter, cache, progress, machine._at.controls, machine._at.controls.keys(), None, TOKENS, machine.format
        )
    )
    got = guess(machine._decoder, drafter, machine._cache, machine._progress)
    length = int(np.asarray(machine._progress.position).max())
    tokens, where = np.zeros((SLOTS, length), np.int32), np.full((SLOTS, length), -1, np.int32)
    for row, one in enumerate(running):
        read = [*one.request.tokens, *one.tokens[:-1]]
        tokens[row, : len(read)], where[row, : len(read)] = read, np.arange(len(read))
        assert set(positions[row]) >= set(range(len(read) - WINDOW - 1, len(read)))
        assert positions[row].max() == len(read) - 1

    def fresh(model, decoder, drafter, progress):
        h, cache = model.prefill(tokens, where, LENGTH, TOKENS + 2, machine.format)
        hidden = jnp.take_along_axis(h, (where.max(axis=1))[:, None, None], axis=1)[:, 0]
        progress = dataclasses.replace(progress, hidden=hidden)
        controls = machine._at.controls
        return hidden, speculate._guesses(
            decoder, drafter, cache, progress, controls, controls.keys(), None, TOKENS, machine.format
        )

    hidden, wanted = quick.jit(fresh)(model, machine._decoder, drafter, machine._progress)
    if cache.storage == "compute":
        np.testing.assert_allclose(machine._progress.hidden, hidden, atol=2e-3)
    np.testing.assert_array_equal(got, wanted)

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
    GREEDY,
    HOT,
    LENGTH,
    SLOTS,
    WINDOW,
    Only,
    compilations,
    model_of,
    prompts_of,
    run,
)

from gemma4_jax.config import KINDS
from gemma4_jax.config_drafter import DrafterConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer import engine, speculate, steps
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.drafting import Drafting
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.sampler import Rule, Rules, choose
from gemma4_jax.model.drafter import Drafter, abstract_drafter
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.kv import Cache
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.sharding import make_mesh

TOKENS, CHUNK = 4, 16
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
        fill, finish = (
            dict(static_argnums=(7, 8), donate_argnums=(1, 2)),
            dict(static_argnums=(9, 10), donate_argnums=6),
        )
        for module, name, options in (
            (engine, "draft_steps", draft),
            (engine, "decode_steps", plain),
            (steps, "fill", fill),
            (steps, "finish", finish),
        ):
            patch.setattr(module, name, quick.jit(getattr(module, name).__wrapped__, **options))
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


def requests_of(variant: str) -> list[Request]:
    """As many as slots, all read in three chunks (few programs); of E2B more than slots, of any length."""
    lengths = (3, WINDOW + 2, 2 * WINDOW, 5, 3 * WINDOW + 6) if variant == "tiny_e2b" else (33, 48, 41)
    news = (9, NEW, NEW, NEW, NEW) if variant == "tiny_e2b" else (NEW, NEW + 3, NEW)
    return [
        Request(prompt, new, GREEDY if i % 2 == 0 else HOT, stream=i)
        for i, (prompt, new) in enumerate(zip(prompts_of(lengths), news, strict=True))
    ]


def assert_as_forward(model: Transformer, running: list[Running]) -> None:
    """One forward pass over prompts and answers gives the same log-probabilities, and greedy answers are its largest."""
    sequences = np.zeros((len(running), LENGTH), np.int32)
    positions = np.full((len(running), LENGTH), -1, np.int32)
    for row, one in enumerate(running):
        whole = [*one.request.tokens, *one.tokens]
        sequences[row, : len(whole)], positions[row, : len(whole)] = whole, np.arange(len(whole))
    logits = np.asarray(quick.jit(lambda m, t, p: m(t, p))(model, sequences, positions))
    for row, one in enumerate(running):
        at = logits[row, len(one.request.tokens) - 1 :][: len(one.tokens)]
        if one.request.rule == GREEDY:
            np.testing.assert_array_equal(at.argmax(axis=-1), one.tokens)
        want = np.asarray(jax.nn.log_softmax(at))[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.logprobs, want, atol=5e-4)  # float32 in another order of sums


def assert_same(got: list[Running], want: list[Running]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one.tokens, one.reason) == (other.tokens, other.reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-4)  # float32 in another order of sums


@pytest.mark.parametrize(
    "variant",
    ["tiny_e2b", "tiny_31b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_e4b", "tiny_26b_a4b"))],
)
def test_answers_are_the_models_own_whoever_guesses(variant: str, monkeypatch: pytest.MonkeyPatch):
    """Past three windows, greedy and drawn: when no guess holds, when all do, and when rows accept different numbers of them."""
    monkeypatch.setattr(Drafting, "length", lambda self: TOKENS)
    model = model_of(variant)
    cache = CacheConfig("rotate_on_read" if variant == "tiny_26b_a4b" else None)  # of 31B unified, of the others plain
    machine = together_only(machine_of(variant, scripted(model, [], wrong=1.0), cache))
    work = machine.drafting
    want = run(machine, requests_of(variant))
    assert work.rate < 0.1
    assert all(len(one.tokens) == one.request.max_new_tokens for one in want)
    assert_as_forward(model, want)
    if variant == "tiny_31b":
        assert_same(run(together_only(machine_of(variant)), requests_of(variant)), want)
    for wrong, least, most in ((0.0, 0.95, 1.0), (0.25, 0.3, 0.8)):
        work.module = scripted(model, want, wrong)
        work.use(machine._ready())
        work.drafted = work.accepted = work.rounds = work.given = 0
        assert_same(run(machine, requests_of(variant)), want)
        assert least < work.rate <= most
        assert work.tokens_per_pass > (4 if wrong == 0 else 1.5)


def test_the_drafter_sees_what_was_accepted_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    """Its guesses after many rejected ones, far beyond the window, are those from a cache that was never drafted into."""
    monkeypatch.setattr(Drafting, "length", lambda self: TOKENS)
    model, drafter = model_of("tiny_e2b"), random_drafter("tiny_e2b")
    machine = together_only(machine_of("tiny_e2b", drafter))
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
    np.testing.assert_allclose(machine._progress.hidden, hidden, atol=2e-3)  # float32 through other kernels
    np.testing.assert_array_equal(got, wanted)


def test_nothing_compiles_after_warm_up_and_every_request_is_answered_as_alone(monkeypatch: pytest.MonkeyPatch):
    """Forms, stop ids, kept beginnings and streams beside guesses; the same answers whether tokens are guessed or not."""
    target = model_of("tiny_e2b")
    sizes = dict(slots=2, max_length=LENGTH, cache=CacheConfig(storage="int8", prefix_mb=10), chunk=16)
    machine = Engine(target, **sizes, drafter=random_drafter("tiny_e2b"), draft_tokens=1)
    machine.warm_up()
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 128, 40).tolist()

    def requests():
        draws = np.random.default_rng(4)
        for i in range(20):
            tokens = (shared[: draws.integers(0, 41)] + draws.integers(3, 128, draws.integers(1, 40)).tolist())[:90]
            rule = [GREEDY, HOT, Rule(), Rule(top_k=0, top_p=0.5), Rule(min_p=0.2)][i % 5]
            stops = tuple(draws.integers(0, 128, draws.integers(0, 20)).tolist())
            bound = Only(list(range(20, 70)), 3) if i % 7 == 0 else None
            yield Request(tokens, int(draws.integers(1, 22)), rule, i, 0, stops, constraint=bound)

    answers = {}
    with compilations() as compiled:
        for count in (0, 1):
            monkeypatch.setattr(Drafting, "length", lambda self, count=count: count)
            machine.prefixes.clear()
            answers[count] = run(machine, list(requests()))
            assert any(one.reused for one in answers[count])
        assert compiled == []
    assert machine.drafting.drafted > 0
    assert_same(answers[1], answers[0])
    assert all(set(one.tokens) <= {*range(20, 70), *one.request.stop_ids} for one in answers[1][::7])
    assert {one.reason for one in answers[1]} == {"stop", "length"}


class Chain:
    """A model whose next token depends on the newest alone, so that what it should draw can be written down."""

    def __init__(self, logits_VV: np.ndarray):
        self.table = jnp.asarray(logits_VV)

    def step(self, tokens_BT, positions_BT, cache, cache_format, rows):
        return jax.nn.one_hot(tokens_BT, len(self.table)), cache

    def logits(self, hidden_BTD):
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, self.table)


@pytest.mark.parametrize("guesser", ["likeliest", "same noise"])
def test_what_is_drawn_has_the_models_distribution_whoever_guesses(guesser: str):
    """Three tokens of a vocabulary of five, many times: as often as their probabilities say, top-k rule included."""
    rng, vocab, times = np.random.default_rng(7), 5, 6_000
    logits = rng.normal(0, 1.2, (vocab, vocab)).astype(np.float32)
    rule = Rule(temperature=0.8, top_k=4, top_p=1.0)
    chain = Chain(logits)
    row = np.zeros(times, np.int32)
    rules = Rules(*(np.full(times, x) for x in (np.float32(0.8), np.int32(4), np.float32(1), np.float32(0))))
    controls = steps.Controls(rules, row.astype(np.uint32), np.arange(times, dtype=np.int32), row[:, None] - 1)
    masks = steps.Masks(np.full((times, 1), 2**32 - 1, np.uint32), np.bool_(False))
    empty = Cache((), {kind: jnp.full((times, 8), -1, jnp.int32) for kind in KINDS})

    @quick.jit
    def one_round(progress):
        keys = controls.keys()
        first = chain.table[progress.token].argmax(axis=-1).astype(jnp.int32)
        if guesser == "same noise":  # the model's own choice, then nonsense
            first, _ = choose(chain.table[progress.token], rules, speculate._keys_at(keys, progress.position + 1))
        second = chain.table[first].argmax(axis=-1).astype(jnp.int32)
        guesses = jnp.stack([first, second], axis=1)
        return speculate._judged(chain, empty, progress, controls, keys, masks, row + 2, guesses, None, CacheFormat())[
            1:
        ]

    progress = steps.Progress(row + 0, row + 3, row > 0, row + 3, jnp.zeros((times, vocab)))
    found, verdicts = np.zeros((times, 4), np.int32), []
    for _ in range(3):  # every round gives a token
        before = np.asarray(progress.position) - 3
        progress, tokens, _, verdict = jax.tree.map(np.asarray, one_round(progress))
        for place in range(3):
            at = np.where(tokens[:, place] >= 0, before + place, 3)
            found[np.arange(times), at] = tokens[:, place]
        verdicts.append(verdict)
    found, done, verdict = found[:, :3], progress.done, verdicts[0]
    assert done.all()
    kept = np.where(logits >= np.sort(logits, axis=1)[:, -rule.top_k][:, None], logits / rule.temperature, -np.inf)
    p = np.exp(kept - kept.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = (p[0][:, None, None] * p[:, :, None] * p[None]).ravel() * times
    counts = np.bincount(np.ravel_multi_index(found.T, (vocab,) * 3), minlength=vocab**3)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    statistic = ((counts - expected)[some] ** 2 / expected[some]).sum()
    cells = some.sum() - 1
    assert statistic < cells + 5 * (2 * cells) ** 0.5, "more than five deviations of chi-square"
    share = verdict.accepted.sum() / (verdict.accepted.sum() + verdict.rejected.sum())
    assert 0.3 < share < 0.9


def test_the_number_of_guesses_follows_how_they_fare():
    work = Drafting(random_drafter("tiny_31b"), 8)
    work._cost = 0.1
    assert work.lengths == (0, 4, 8)
    chosen = {}
    for name, (accepted, rejected) in {"good": (8, 0), "fair": (2, 2), "bad": (0, 3)}.items():
        for _ in range(60):
            work.learn(
                np.zeros((1, 1, 9), np.int32), speculate.Verdict(np.int32(8), np.int32(accepted), np.int32(rejected))
            )
        chosen[name] = work.length()
    assert chosen == {"good": 8, "fair": 4, "bad": 0}
    later = [work.length() for _ in range(40)]
    assert 2 <= later.count(4) <= 3, "now and then some are made, for texts differ"
    assert work.report() == f"{work.accepted / work.drafted:.0%} of 1440 guesses held, 9.0 tokens a pass"


def test_a_drafter_of_another_model_is_refused():
    for drafter, tokens, sentence in (
        (random_drafter("tiny_e2b"), 4, "its key/value heads of sliding layers is 1, the model's 4"),
        (random_drafter("tiny_31b"), 0, "draft_tokens lies in 1 to 16, got 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            Engine(model_of("tiny_31b"), slots=1, max_length=LENGTH, drafter=drafter, draft_tokens=tokens)
    with (
        jax.set_mesh(make_mesh({"tensor": 8})),
        pytest.raises(UserError, match=r"mesh\.tensor=8 cannot share out 4 query"),
    ):
        Drafting.of(random_drafter("tiny_e2b"), model_of("tiny_e2b").cfg, 4)


@pytest.mark.slow
def test_the_cache_is_updated_in_place():
    """With XLA's optimisations: guessing ahead holds no second cache."""
    machine = Engine(model_of("tiny_e2b"), slots=4, max_length=2048, drafter=random_drafter("tiny_e2b"))
    machine.reserve(2048)
    size = sum(x.nbytes for x in jax.tree.leaves(machine._cache))
    masks = steps.Masks(machine._all_allowed, np.bool_(False))
    before = machine._cache, machine._progress, machine._at.controls, machine._at.ended, masks
    most, one = np.full(4, TOKENS, np.int32), np.int32(1)
    lowered = speculate.draft_steps.lower(
        machine._decoder,
        machine.drafting.ready,
        *before,
        most,
        one,
        np.bool_(False),
        None,
        count=TOKENS,
        cache_format=machine.format,
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.2 * size

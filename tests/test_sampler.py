"""Tokens from logits, against a plain NumPy reading of each rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.errors import UserError
from gemma4_jax.infer.sampler import FEW, Rule, Rules, choose, largest

VOCAB = 1000  # no multiple of the block the draw works in
RULES = {
    "published": Rule(),
    "top_k": Rule(top_k=5, top_p=1.0),
    "top_p": Rule(top_k=0, top_p=0.7),
    "few then top_p": Rule(top_k=40, top_p=0.5),
    "many then top_p": Rule(top_k=FEW + 40, top_p=0.9),
    "min_p among few": Rule(top_k=30, top_p=1.0, min_p=0.1),
    "min_p among all": Rule(temperature=1.5, top_k=0, top_p=1.0, min_p=0.05),
    "hot": Rule(temperature=2.0, top_k=20, top_p=0.9),
    "cold": Rule(temperature=0.3, top_k=0, top_p=0.95),
    "everything at once": Rule(temperature=1.3, top_k=FEW + 1, top_p=0.8, min_p=0.02),
    "nothing": Rule(top_k=0, top_p=1.0),
}


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, (rows, vocab)).astype(np.float32)


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def expected(logits: np.ndarray, rule: Rule) -> np.ndarray:
    """The probability of each token under a rule, by sorting."""
    scaled = logits.astype(np.float64) / rule.temperature
    order = np.argsort(-scaled)
    p = np.exp(scaled[order] - scaled[order[0]])
    if rule.top_k:
        p[rule.top_k :] = 0
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= rule.top_p] = 0
    p[p < rule.min_p * p[0]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize("name", RULES)
def test_draws_follow_the_rule(name: str):
    rule, draws = RULES[name], 6000
    logits = logits_of(1)[0]
    want = expected(logits, rule)
    tokens, logprobs = jax.jit(choose)(
        jnp.broadcast_to(logits, (draws, VOCAB)), Rules.of([rule] * draws), keys_of(draws)
    )
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[want == 0].sum() == 0
    # Total variation between the draws and what is wanted: about sqrt(kept / (2 pi draws)) when they agree.
    kept = (want > 0).sum()
    assert 0.5 * np.abs(counts / draws - want).sum() < 1.5 * np.sqrt(kept / (2 * np.pi * draws)) + 0.01
    raw = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, raw[np.asarray(tokens)], atol=1e-5)


def test_greedy_takes_the_first_of_the_largest():
    logits = logits_of(4)
    logits[1, [17, 900]] = 50.0
    rules = Rules.of([Rule(temperature=0.0)] * 4)
    tokens, _ = choose(jnp.asarray(logits), rules, keys_of(4))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert tokens[1] == 17
    np.testing.assert_array_equal(largest(jnp.full((2, 3), -jnp.inf)), [0, 0])


def test_cold_or_narrow_rules_are_greedy():
    logits = logits_of(4)
    rules = [Rule(temperature=1e-30), Rule(top_k=1), Rule(top_p=1e-6, top_k=0), Rule(min_p=1.0)]
    tokens, _ = choose(jnp.asarray(logits), Rules.of(rules), keys_of(4))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_a_row_does_not_depend_on_its_batch_mates():
    rules = [Rule(temperature=0.0), *RULES.values()]
    logits, keys = logits_of(len(rules)), keys_of(len(rules), 3)
    one = jax.jit(choose)
    together, _ = one(jnp.asarray(logits), Rules.of(rules), keys)
    for row, rule in enumerate(rules):
        alone, _ = one(jnp.asarray(logits[row : row + 1]), Rules.of([rule]), keys[row : row + 1])
        assert alone[0] == together[row], rule


def test_a_vocabulary_smaller_than_the_candidates():
    logits = logits_of(2, vocab=7)
    tokens, _ = choose(jnp.asarray(logits), Rules.of([Rule(), Rule(top_k=0)]), keys_of(2))
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < 7)).all()


def primitives(jaxpr, inside: bool = False) -> set[tuple[str, bool]]:
    """(name, inside a conditional) of everything a program does."""
    found = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        found.add((name, inside))
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    found |= primitives(inner, inside or name == "cond")
    return found


def test_nothing_is_sorted_and_greedy_rows_cost_no_draw():
    """Top-k, random numbers and the search for thresholds stand inside conditionals, which greedy batches skip."""
    rules = Rules.of([Rule()])
    found = primitives(jax.make_jaxpr(choose)(jnp.zeros((1, VOCAB)), rules, keys_of(1)).jaxpr)
    names = {name for name, _ in found}
    assert {"cond", "top_k", "random_bits"} <= names, "the names of the primitives have changed"
    assert not names & {"sort", "argmax"}
    assert not {("top_k", False), ("random_bits", False), ("while", False), ("scan", False)} & found


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("temperature", -1.0, "temperature is 0"),
        ("temperature", float("nan"), "temperature is 0"),
        ("temperature", float("inf"), "temperature is 0"),
        ("top_k", -1, "top_k is a whole number"),
        ("top_k", 1.5, "top_k is a whole number"),
        ("top_p", 0.0, "top_p lies above 0"),
        ("top_p", 1.1, "top_p lies above 0"),
        ("min_p", -0.1, "min_p lies in 0"),
        ("min_p", 2.0, "min_p lies in 0"),
    ],
)
def test_values_without_meaning(field: str, value: float, sentence: str):
    with pytest.raises(UserError, match=sentence) as caught:
        dataclasses.replace(Rule(), **{field: value})
    assert str(value) in str(caught.value)

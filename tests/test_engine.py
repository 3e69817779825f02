"""Decoding through the caches against one forward pass; what compiles, what is copied, what idle rows leave behind."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.infer import engine
from gemma4_jax.infer.engine import CHUNK, Engine, Request, bucket, decoder_of
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.model.parameters import arrays, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant import policy

WINDOW = 16
SMALL = dict(sliding_window=WINDOW, vocab_size=128, hidden_size=64, head_dim=16, global_head_dim=32)
# Blocks of one sliding and one full layer: every kind of layer, and little to compile.
LAYERS = {
    "tiny_e2b": dict(layer_period=2, num_hidden_layers=6, num_kv_shared_layers=2),
    "tiny_e4b": dict(layer_period=2, num_hidden_layers=6, num_kv_shared_layers=2),
    "tiny_26b_a4b": dict(layer_period=2, num_hidden_layers=4),
    "tiny_31b": dict(layer_period=2, num_hidden_layers=4),
}
GREEDY = Rule(temperature=0.0)
HOT = Rule(temperature=2.0, top_k=0, top_p=1.0)
ROWS, CACHE = 4, 96  # with a longest prompt of 25 to 32 tokens, the one shape that most tests compile


@functools.cache
def model_of(variant: str, seed: int = 1) -> Transformer:
    """A random model in which no scale is 1, so that none can be left out unseen; made by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def scramble(name, variable):
        shape = variable.get_value().shape
        if name.endswith("embed.w"):
            return jnp.asarray(rng.normal(0, SMALL["hidden_size"] ** -0.5, shape), jnp.float32)
        if name.endswith(".w"):
            return jnp.asarray(rng.normal(0, 0.12, shape), jnp.float32)
        # Layers that write much keep the tied head from repeating its input.
        return jnp.asarray(rng.uniform(0.5, 1.5, shape) * (3 if "post_" in name else 1), jnp.float32)

    return map_arrays(scramble, abstract(ModelConfig.variant(variant, **SMALL, **LAYERS[variant])))


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SMALL["vocab_size"], length).tolist() for length in lengths]


def run(machine: Engine, requests: list[Request], rows: int = ROWS) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens and log-probabilities of every request."""
    batch, tokens, logprobs = machine.prefill(requests, rows, CACHE)
    parts = [(tokens, logprobs)]
    while not np.asarray(batch.progress.done).all():
        parts.append(machine.decode(batch, np.zeros(rows, bool)))
    tokens, logprobs = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    real = [row >= 0 for row in tokens]
    assert not any(keep.any() for keep in real[len(requests) :]), "an idle row answered"
    mine = range(len(requests))
    return [tokens[i, real[i]].tolist() for i in mine], [logprobs[i, real[i]] for i in mine]


def assert_as_forward(model: Transformer, requests: list[Request], answers: list[list[int]], logprobs) -> None:
    """One forward pass over prompts and answers gives the same log-probabilities, and greedy answers are its largest."""
    sequences = np.zeros((ROWS, CACHE), np.int32)
    positions = np.full((ROWS, CACHE), -1, np.int32)
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        size = len(request.tokens) + len(answer)
        sequences[row, :size], positions[row, :size] = [*request.tokens, *answer], np.arange(size)
    logits = np.asarray(jax.jit(lambda m, t, p: m(t, p))(model, sequences, positions))
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        at = logits[row, len(request.tokens) - 1 :][: len(answer)]
        if request.rule == GREEDY:
            np.testing.assert_array_equal(at.argmax(axis=-1), answer)
        want = np.asarray(jax.nn.log_softmax(at))[np.arange(len(answer)), answer]
        np.testing.assert_allclose(logprobs[row], want, atol=5e-4)  # float32 in another order of sums


def test_buckets():
    sizes = [bucket(n, 10_000) for n in (1, 16, 17, 24, 25, 33, 50, 64, 65, 1000, 1025)]
    assert sizes == [16, 16, 24, 24, 32, 48, 64, 64, 96, 1024, 1536]
    assert bucket(50, 60) == 60
    assert all(n <= bucket(n, 10_000) <= max(16, 1.5 * n) for n in range(1, 5000))


@pytest.mark.parametrize("variant", LAYERS)
def test_decoding_through_the_cache_equals_a_forward_pass(variant: str):
    """Prompts shorter and longer than the window, answers past three windows, greedy and drawn, one batch."""
    new = 3 * WINDOW + 5
    rules = (GREEDY, HOT, GREEDY, HOT)
    prompts = prompts_of((3, WINDOW + 2, 2 * WINDOW, 5))
    requests = [Request(prompt, new, rule) for prompt, rule in zip(prompts, rules, strict=True)]
    answers, logprobs = run(Engine(model_of(variant)), requests)
    assert [len(answer) for answer in answers] == [new] * 4
    assert all(len(set(answer)) > 8 for answer in answers[1::2]), "answers that repeat themselves show little"
    assert_as_forward(model_of(variant), requests, answers, logprobs)


def test_a_batch_gives_what_each_request_gives_alone():
    machine = Engine(model_of("tiny_e2b"))
    rules = (GREEDY, Rule(), HOT)
    sizes = (5, 40, 33)
    requests = [
        Request(prompt, size, rule, seed=7, stream=i)
        for i, (prompt, rule, size) in enumerate(zip(prompts_of((25, 30, 32)), rules, sizes, strict=True))
    ]
    together, _ = run(machine, requests)
    assert [len(answer) for answer in together] == [*sizes]
    for request, answer in zip(requests, together, strict=True):
        alone, _ = run(machine, [request], rows=1)
        assert alone == [answer]


def test_seed_and_stream_decide_what_is_drawn():
    machine = Engine(model_of("tiny_e2b"))
    prompt = prompts_of((27,))[0]
    pairs = ((0, 0), (0, 1), (1, 0), (0, 0))
    answers, _ = run(machine, [Request(prompt, 12, Rule(), seed, stream) for seed, stream in pairs])
    assert answers[0] == answers[3]
    assert len({tuple(answer) for answer in answers}) == 3


def test_stop_ids_end_their_own_row_only():
    machine = Engine(model_of("tiny_e2b"))
    requests = [Request(prompt, 40, HOT, stream=i) for i, prompt in enumerate(prompts_of((4, 30)))]
    (first, second), _ = run(machine, requests)
    place = next(i for i, token in enumerate(first) if i > 3 and token not in first[:i])
    stop = dataclasses.replace(requests[0], stop_ids=(1, first[place]))
    assert run(machine, [stop, requests[1]])[0] == [first[: place + 1], second]


def test_rows_ended_from_outside_stay_idle():
    machine = Engine(model_of("tiny_e2b"))
    requests = [Request(prompt, 40, GREEDY) for prompt in prompts_of((4, 30))]
    batch, _, _ = machine.prefill(requests, 4, CACHE)
    before = {kind: np.asarray(batch.cache.positions[kind]) for kind in ("full", "sliding")}
    assert all((at[2:] == -1).all() for at in before.values()), "idle rows wrote into the cache"
    assert [(at[:2] >= 0).sum(axis=1).tolist() for at in before.values()] == [[4, n] for n in (30, WINDOW)]
    tokens, _ = machine.decode(batch, np.array([True, False, False, False]))
    assert (tokens[[0, 2, 3]] == -1).all()
    assert (tokens[1] >= 0).all()
    after = {kind: np.asarray(at) for kind, at in batch.cache.positions.items()}
    assert all((after[kind][[0, 2, 3]] == at[[0, 2, 3]]).all() for kind, at in before.items())


def test_nothing_compiles_again_for_other_lengths_rules_and_weights():
    machine = Engine(model_of("tiny_e2b"))
    programs: list[Any] = [engine.prefill_step, engine.first_token, engine.decode_steps]
    run(machine, [Request(prompt, 40, GREEDY) for prompt in prompts_of((4, 30))])
    sizes = [program._cache_size() for program in programs]
    first, second = prompts_of((25, 31), seed=1)
    run(machine, [Request(first, 3, Rule(top_k=0, top_p=0.5), 5, 1, (4, 9)), Request(second, 9, Rule(min_p=0.2), 6, 2)])
    machine.update(map_arrays(lambda _, variable: variable.get_value() * 0.5, model_of("tiny_e2b")))
    run(machine, [Request(prompt, 40, GREEDY) for prompt in prompts_of((29, 17))])
    assert [program._cache_size() for program in programs] == sizes


def test_new_weights_give_new_answers_and_released_ones_none():
    machine = Engine(model_of("tiny_e2b"))
    requests = [Request(prompt, 12, GREEDY) for prompt in prompts_of((4, 30))]
    old, _ = run(machine, requests)
    machine.update(model_of("tiny_e2b", seed=5))
    new, _ = run(machine, requests)
    assert old != new
    machine.update(None)
    with pytest.raises(ValueError, match="released"):
        run(machine, requests)
    machine.update(model_of("tiny_e2b"))
    assert run(machine, requests)[0] == old


def test_the_cache_is_updated_in_place():
    machine = Engine(model_of("tiny_e2b"))
    batch, _, _ = machine.prefill([Request([5, 6, 7], 9, GREEDY)], ROWS, 2048)
    cache, size = batch.cache, sum(x.nbytes for x in jax.tree.leaves(batch.cache))
    arguments = machine._decoder, cache, batch.progress, batch.controls, np.zeros(ROWS, bool)
    memory = engine.decode_steps.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    # Attention on CPU turns one layer's keys round at a time; a second cache would be more.
    assert memory.temp_size_in_bytes < 0.75 * size
    machine.decode(batch, np.zeros(ROWS, bool))
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_quantised_weights_are_rounded_once_and_decode_as_the_model_does():
    model = policy.apply(model_of("tiny_e2b"), policy.QuantConfig())
    requests = [Request(prompt, CHUNK, GREEDY) for prompt in prompts_of((3, 30))]
    answers, logprobs = run(Engine(model), requests)
    assert_as_forward(model, requests, answers, logprobs)
    assert all(module.grid is None for _, module in policy.quantisable(decoder_of(model)))
    assert any(module.grid is not None for _, module in policy.quantisable(model)), "the model itself was changed"


def test_decoding_weights_have_the_compute_dtype_and_tables_are_shared():
    model = abstract(model_of("tiny_26b_a4b").cfg, compute_dtype="bfloat16")
    decoder = decoder_of(map_arrays(lambda name, _: arrays(model_of("tiny_26b_a4b"))[name], model))
    dtypes = {module.role: module.w.get_value().dtype for _, module in policy.quantisable(decoder)}
    assert dtypes.pop("router") == jnp.float32
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
    model = model_of("tiny_e2b")
    assert decoder_of(model).embed.w.get_value() is model.embed.w.get_value()

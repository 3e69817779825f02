"""The engine against one forward pass; requests beside others, streamed, from a kept beginning; what compiles; what is freed."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer import steps
from gemma4_jax.infer.buckets import bucket, chunk_sizes
from gemma4_jax.infer.cache import CacheConfig
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.infer.weights import decoder_of
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
SLOTS, LENGTH, CHUNK = 3, 112, 32


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


@functools.cache
def machine_of(variant: str = "tiny_e2b", cache: CacheConfig = CacheConfig(prefix_mb=10)) -> Engine:  # noqa: B008
    machine = Engine(model_of(variant), slots=SLOTS, max_length=LENGTH, cache=cache, chunk=CHUNK)
    machine.reserve(LENGTH)
    return machine


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SMALL["vocab_size"], length).tolist() for length in lengths]


def run(machine: Engine, requests: list[Request]) -> list[Running]:
    running = [machine.submit(request) for request in requests]
    while machine.step():
        pass
    assert all(one.done and one.slot is None for one in running)
    return running


def assert_as_forward(model: Transformer, running: list[Running]) -> None:
    """One forward pass over prompts and answers gives the same log-probabilities, and greedy answers are its largest."""
    sequences = np.zeros((len(running), LENGTH), np.int32)
    positions = np.full((len(running), LENGTH), -1, np.int32)
    for row, one in enumerate(running):
        size = len(one.request.tokens) + len(one.tokens)
        sequences[row, :size], positions[row, :size] = [*one.request.tokens, *one.tokens], np.arange(size)
    logits = np.asarray(jax.jit(lambda m, t, p: m(t, p))(model, sequences, positions))
    for row, one in enumerate(running):
        at = logits[row, len(one.request.tokens) - 1 :][: len(one.tokens)]
        if one.request.rule == GREEDY:
            np.testing.assert_array_equal(at.argmax(axis=-1), one.tokens)
        want = np.asarray(jax.nn.log_softmax(at))[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.logprobs, want, atol=5e-4)  # float32 in another order of sums


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, _seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_buckets():
    sizes = [bucket(n, 10_000) for n in (1, 16, 17, 24, 25, 33, 50, 64, 65, 1000, 1025)]
    assert sizes == [16, 16, 24, 24, 32, 48, 64, 64, 96, 1024, 1536]
    assert bucket(50, 60) == 60
    assert all(n <= bucket(n, 10_000) <= max(16, 1.5 * n) for n in range(1, 5000))
    assert chunk_sizes(128) == [16, 32, 64, 128]


@pytest.mark.parametrize("variant", LAYERS)
def test_answers_are_those_of_a_forward_pass_whatever_runs_beside_them(variant: str):
    """Prompts of one and several chunks, past three windows; greedy and drawn; more requests than slots."""
    machine = machine_of(variant)
    new = 3 * WINDOW + 5
    rules = (GREEDY, HOT, GREEDY, HOT, GREEDY)
    prompts = prompts_of((3, WINDOW + 2, 2 * WINDOW, 5, 3 * WINDOW + 6))
    requests = [
        Request(p, new if i else 9, rule, stream=i) for i, (p, rule) in enumerate(zip(prompts, rules, strict=True))
    ]
    together = run(machine, requests)
    assert [len(one.tokens) for one in together] == [9, new, new, new, new]
    assert all(len(set(one.tokens)) > 8 for one in together[1::2]), "answers that repeat themselves show little"
    assert_as_forward(model_of(variant), together)
    for one in (together[2], together[3]):
        machine.prefixes.clear()
        (alone,) = run(machine, [one.request])
        assert (alone.tokens, alone.reused) == (one.tokens, 0)
        run(machine, [dataclasses.replace(one.request, max_new_tokens=6)])
        longer = dataclasses.replace(one.request, tokens=[*one.request.tokens, *one.tokens[:9]], max_new_tokens=20)
        (reused,) = run(machine, [longer])
        assert reused.reused == (37 if one is together[2] else 0), "32 tokens are the shortest that are kept"
        if one.request.rule == GREEDY:
            assert reused.tokens == one.tokens[9:29]


def test_seed_and_stream_decide_what_is_drawn():
    prompt = prompts_of((27,))[0]
    pairs = ((0, 0), (0, 1), (1, 0), (0, 0))
    answers = run(machine_of(), [Request(prompt, 12, Rule(), seed, stream) for seed, stream in pairs])
    assert answers[0].tokens == answers[3].tokens
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_stop_ids_end_their_own_row_only():
    machine = machine_of()
    requests = [Request(prompt, 40, HOT, stream=i) for i, prompt in enumerate(prompts_of((4, 30)))]
    first, second = run(machine, requests)
    place = next(i for i, token in enumerate(first.tokens) if i > 3 and token not in first.tokens[:i])
    unused = sorted(set(range(128)) - set(first.tokens))
    for stops in ((1, first.tokens[place]), (*unused[:17], first.tokens[place])):  # few; more than a slot knows
        stop = dataclasses.replace(requests[0], stop_ids=stops)
        ended, other = run(machine, [stop, requests[1]])
        assert (ended.tokens, ended.reason) == (first.tokens[: place + 1], "stop")
        assert (other.tokens, other.reason) == (second.tokens, "length")


def test_a_cancelled_request_leaves_its_slot_and_the_others_alone():
    machine = machine_of()
    requests = [Request(prompt, 50, HOT, stream=i) for i, prompt in enumerate(prompts_of((4, 30, 50, 20)))]
    want = run(machine, requests)
    running = [machine.submit(request) for request in requests]
    machine.step()
    assert running[3].slot is None
    slot = running[0].slot
    machine.cancel(running[0])
    machine.step()
    assert (running[0].reason, running[3].slot) == ("cancelled", slot)
    waiting = machine.submit(requests[0])
    machine.cancel(waiting)
    machine.cancel(waiting)
    while machine.step():
        pass
    assert [one.tokens for one in running[1:]] == [one.tokens for one in want[1:]]
    assert waiting.tokens == []


def test_bad_requests_are_refused_in_a_sentence_and_the_others_go_on():
    machine = machine_of()
    good = machine.submit(Request([5, 6, 7], 10, GREEDY))
    machine.step(soon=True)
    for request, sentence in (
        (Request([], 5, GREEDY), "the prompt is empty"),
        (
            Request([5] * 100, 13, GREEDY),
            "the prompt has 100 tokens, and with max_new_tokens=13 would pass max_length=112",
        ),
        (Request([5], 0, GREEDY), "max_new_tokens is at least 1, got 0"),
        (Request([5, 128], 3, GREEDY), "token ids run from 0 to 127, got 128"),
        (Request([5], 3, GREEDY, stop_ids=(-1,)), "stop ids run from 0 to 127, got -1"),
        (Request([5], 3, GREEDY, seed=-1), "seed lies in 0 to"),
    ):
        with pytest.raises(UserError, match=sentence):
            machine.submit(request)
    for values in (dict(temperature=-1.0), dict(top_p=1.5)):
        with pytest.raises(UserError):
            Rule(**values)
    while machine.step():
        pass
    assert len(good.tokens) == 10


class Only:
    """A constraint: tokens of a set, then the end."""

    def __init__(self, allowed: list[int], count: int):
        self.allowed, self.left, self.seen = allowed, count, []
        self.failed = ""

    @property
    def finished(self) -> bool:
        return self.left == 0

    def mask(self) -> np.ndarray:
        bits = np.zeros(128, bool)
        bits[self.allowed] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token: int) -> None:
        self.seen.append(token)
        self.left -= 1


def test_a_constraint_binds_its_own_request():
    machine = machine_of()
    prompt, other = prompts_of((9, 35))
    free = run(machine, [Request(prompt, 12, GREEDY), Request(other, 30, HOT)])
    only = Only(sorted(set(range(60, 100)) - set(free[0].tokens)), 7)
    bound, beside = run(machine, [Request(prompt, 12, GREEDY, constraint=only), Request(other, 30, HOT)])
    assert beside.tokens == free[1].tokens
    assert bound.reason == "stop"
    assert len(bound.tokens) == 7
    assert bound.tokens == only.seen
    assert set(bound.tokens) <= set(only.allowed)
    assert_as_forward(
        model_of("tiny_e2b"), [dataclasses.replace(bound, request=dataclasses.replace(bound.request, rule=HOT))]
    )


def test_nothing_compiles_after_warm_up():
    machine = Engine(model_of("tiny_e2b"), slots=SLOTS, max_length=LENGTH, cache=CacheConfig(prefix_mb=10), chunk=CHUNK)
    machine.warm_up()
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 128, 40).tolist()
    bound = jax.device_put(model_of("tiny_e2b", seed=2), jax.devices()[0])  # as weights are that were loaded
    with compilations() as compiled:
        requests = []
        for i in range(200):
            size = int(rng.integers(1, 80))
            tokens = (shared[: rng.integers(0, 41)] + rng.integers(3, 128, size).tolist())[:90]
            rule = [GREEDY, HOT, Rule(), Rule(top_k=0, top_p=0.5), Rule(min_p=0.2)][i % 5]
            stops = tuple(rng.integers(0, 128, rng.integers(0, 20)).tolist())
            constraint = Only(list(range(20, 70)), 3) if i % 7 == 0 else None
            new = int(rng.integers(1, 22))
            requests.append(Request(tokens, new, rule, i, 0, stops, constraint=constraint))
        first, rest = requests[:20], requests[20:]
        run(machine, first)
        assert compiled == []
        machine.update(bound)
        machine._ready()
        compiled.clear()  # cutting stacked weights apart
        running = run(machine, rest)
        assert compiled == []
        assert any(one.reused for one in running)


def test_new_weights_give_new_answers_and_released_ones_none():
    machine = Engine(model_of("tiny_e2b"), slots=SLOTS, max_length=LENGTH, chunk=CHUNK)
    requests = [Request(prompt, 12, GREEDY) for prompt in prompts_of((4, 30))]
    old = [one.tokens for one in run(machine, requests)]
    machine.update(model_of("tiny_e2b", seed=5))
    assert old != [one.tokens for one in run(machine, requests)]
    machine.update(None)
    with pytest.raises(ValueError, match="released"):
        run(machine, requests)
    machine.update(model_of("tiny_e2b"))
    assert [one.tokens for one in run(machine, requests)] == old


def test_a_cache_that_grows_keeps_what_runs():
    machine = Engine(model_of("tiny_31b"), slots=SLOTS, max_length=LENGTH, chunk=CHUNK)
    short, long = (Request(prompt, 25, GREEDY) for prompt in prompts_of((4, 70)))
    first = machine.submit(short)
    machine.step(soon=True)
    second = machine.submit(long)
    while machine.step():
        pass
    assert_as_forward(model_of("tiny_31b"), [first, second])


def test_the_cache_is_updated_in_place():
    machine = Engine(model_of("tiny_e2b"), slots=4, max_length=2048)
    machine.reserve(2048)
    run(machine, [Request([5, 6, 7], 3, GREEDY)])
    cache, size = machine._cache, sum(x.nbytes for x in jax.tree.leaves(machine._cache))
    masks = steps.Masks(machine._all_allowed, np.bool_(False))
    controls, one = machine._at.controls, np.int32(1)
    arguments = (
        machine._decoder,
        cache,
        machine._progress,
        controls,
        machine._at.ended,
        masks,
        one,
        np.bool_(False),
        None,
    )
    memory = steps.decode_steps.lower(*arguments, cache_format=machine.format).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.2 * size
    machine.submit(Request([5, 6, 7], 3, GREEDY))
    machine.step()
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_quantised_weights_are_rounded_once_and_decode_as_the_model_does():
    model = policy.apply(model_of("tiny_e2b"), policy.QuantConfig())
    machine = Engine(model, slots=SLOTS, max_length=LENGTH, chunk=CHUNK)
    assert_as_forward(model, run(machine, [Request(prompt, 20, GREEDY) for prompt in prompts_of((3, 30))]))
    kept = [module.role for _, module in policy.quantisable(decoder_of(model)) if module.grid is not None]
    assert set(kept) == {"per_layer_embedding"}, "only a table that is read by rows is rounded row by row"
    assert any(module.grid is not None for _, module in policy.quantisable(model)), "the model itself was changed"


def test_bfloat16_weights_decode_in_float32_on_cpu_and_tables_are_shared():
    model = abstract(model_of("tiny_26b_a4b").cfg, compute_dtype="bfloat16")
    decoder = decoder_of(map_arrays(lambda name, _: arrays(model_of("tiny_26b_a4b"))[name], model))
    assert {str(module.w.get_value().dtype) for _, module in policy.quantisable(decoder)} == {"float32"}
    assert decoder.compute_dtype == "float32"
    tables = [
        part.embed.w.get_value().unsafe_buffer_pointer()
        for part in (model_of("tiny_e2b"), decoder_of(model_of("tiny_e2b")))
    ]
    assert tables[0] == tables[1]


def test_weights_that_are_needed_for_nothing_else_exist_once():
    model = map_arrays(lambda _, variable: variable.get_value() + 0.0, model_of("tiny_e2b"))
    stacked = [x for stack in (model.own, model.shared) for x in jax.tree.leaves(stack)]
    machine = Engine(model, slots=SLOTS, max_length=LENGTH, chunk=CHUNK, consume=True)
    assert all(x.is_deleted() for x in stacked)
    request = Request(prompts_of((30,))[0], 12, GREEDY)
    assert run(machine, [request])[0].tokens == run(machine_of(), [request])[0].tokens

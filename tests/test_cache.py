"""What caches store, read and cost: layouts, 8 bits, blocks of slots, chunks written to rows, bytes."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cache_quality import losses
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.cache import GIB, CacheConfig, allocated_bytes, fits, report, request_bytes, token_bytes
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.request import Request
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.kernels import cached, reference
from gemma4_jax.kernels.cached import Codes, Fresh, cached_attention
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.kv import Chunk, begin_rows, empty_cache, extend_rows, halo, slot_of, write, write_rows
from gemma4_jax.model.layouts import CacheFormat, Layout, Storage, decoded, encoded
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import abstract

FORMATS = [
    CacheFormat(layout, storage)
    for layout in ("plain", "unified", "rotate_on_read")
    for storage in ("compute", "int8", "fp8")
]


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def ring(last: np.ndarray, slots: int) -> np.ndarray:
    """The position in each slot after tokens 0..last, [B, slots]."""
    positions = last[:, None] - (last[:, None] - np.arange(slots)[None]) % slots
    return np.where(positions >= 0, positions, -1).astype(np.int32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_to_a_cache_in_blocks(monkeypatch, window: int | None, scaled: bool):
    """Against the plain twin: slots in several blocks, some rows of many, tokens not yet stored, a row that is idle."""
    monkeypatch.setattr(cached, "BLOCK", 8)
    monkeypatch.setattr(cached, "STEP_BLOCK", 8)
    slots, heads, kv_heads, head = 20, 4, 2, 8
    rows, last = np.array([3, 0, 1]), np.array([15, 2, 31 if window else 19])
    k, v = random(4, kv_heads, slots, head), random(4, kv_heads, slots, head, seed=1)
    scale = jnp.abs(random(4, kv_heads, slots, seed=2)) if scaled else None
    k_pos = jnp.asarray(ring(last, slots))
    q = random(3, 2, heads, head, seed=3)
    q_pos = jnp.asarray([[16, 17], [3, -1], [last[2] + 1, last[2] + 2]], jnp.int32)
    new_k, new_v = random(3, kv_heads, 2, head, seed=4), random(3, kv_heads, 2, head, seed=5)
    out, lse = cached_attention(
        (q,),
        {"k": Codes(k, scale), "v": Codes(v, scale)},
        lambda parts, _: (parts["k"],),
        q_pos,
        k_pos,
        window=window,
        rows=jnp.asarray(rows),
        fresh=Fresh({"k": Codes(new_k), "v": Codes(new_v)}, q_pos),
    )
    full = [x if scale is None else x * scale[..., None] for x in (k, v)]
    whole = [
        jnp.concatenate([x[rows], new], axis=2).swapaxes(1, 2) for x, new in zip(full, (new_k, new_v), strict=True)
    ]
    positions = jnp.concatenate([k_pos, q_pos], axis=1)
    want = reference.attention(q, *whole, q_pos, positions, window=window)
    np.testing.assert_allclose(out, want, atol=2e-6)
    assert (np.asarray(out)[1, 1] == 0).all()
    assert np.asarray(lse)[1, 1].max() < -1e19


def tiny(kind: str = "full") -> ModelConfig:
    return ModelConfig.variant("tiny_31b" if kind == "full" else "tiny_e2b", sliding_window=16)


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("storage", ["compute", "int8"])
def test_a_chunk_written_to_rows_is_what_token_by_token_writes(size: int, storage: Storage):
    """A ring that wraps and a cache that does not; pieces of several lengths, one that goes nowhere; then the halo."""
    cfg, window = tiny(), 16
    ordered = size == 40
    kind = "full" if ordered else "sliding"
    form = CacheFormat("plain", storage)
    cache = empty_cache(cfg, 3, size, jnp.float32, cache_format=form)
    index = next(i for i, one in enumerate(cfg.layer_kinds) if one == kind)
    parts, where = cache.layers[index], {kind: cache.positions[kind]}
    by_token, seen = parts, {kind: where[kind]}
    first = np.array([0, 0, 0], np.int32)
    for turn, count in enumerate(([11, 3, 0], [16, 9, 0])):
        count = np.array(count, np.int32)
        rows = np.array([2, 0, 3], np.int32)
        chunk = Chunk(jnp.zeros((3, 16), jnp.int32), *map(jnp.asarray, (rows, first, count, first == 0)))
        shape = (3, 16, cfg.kv_heads(kind), cfg.head_size(kind))
        new = encoded(cfg, kind, form, random(*shape, seed=turn), random(*shape, seed=9 + turn))
        before = begin_rows(seen, chunk)
        old, at = halo(parts, before[kind], chunk, window)
        assert at.shape[1] == min(size, window)
        for p, row in enumerate(rows[:2]):
            kept = np.asarray(at[p])
            np.testing.assert_array_equal(kept[kept >= 0], np.arange(max(0, first[p] - at.shape[1]), first[p]))
            stored = np.asarray(parts["k"].values[row])
            for i in np.flatnonzero(kept >= 0):
                np.testing.assert_array_equal(old["k"].values[p, i], stored[:, kept[i] % size])
        parts = write_rows(parts, chunk, new, ordered=ordered)
        after = extend_rows(before, chunk)
        by_token = write(by_token, slot_of(chunk.positions, size), new, chunk.rows)
        jax.tree.map(np.testing.assert_array_equal, parts, by_token)
        np.testing.assert_array_equal(after[kind][:2], ring(first + count - 1, size)[:2])
        seen = {kind: seen[kind].at[rows[:2]].set(after[kind][:2])}
        first = first + count


def test_eight_bits_hold_a_vector_to_its_scale():
    cfg = tiny()
    k, v = random(2, 5, 2, 64), 30 * random(2, 5, 2, 64, seed=1)
    for storage, bound in (("int8", 1 / 127), ("fp8", 1 / 16)):
        for name, x in (("k", k), ("v", v)):
            codes = encoded(cfg, "full", CacheFormat("plain", storage), k, v)[name]
            assert codes.values.dtype.itemsize == 1
            top = np.abs(np.asarray(x)).max(axis=-1, keepdims=True)
            error = np.abs(np.asarray(decoded(codes, jnp.float32) - x))
            assert (error <= bound * top).all()
            assert error.max() > 0


@functools.cache
def model_of(variant: str):
    """Random, every scale another; blocks of one sliding and one full layer."""
    small = dict(sliding_window=16, vocab_size=128, hidden_size=64, head_dim=16, global_head_dim=32)
    cfg = ModelConfig.variant(variant, **small, layer_period=2, num_hidden_layers=4)
    rng = np.random.default_rng(7)

    def scramble(name, variable):
        shape = variable.get_value().shape
        if name.endswith(".w"):
            return jnp.asarray(rng.normal(0, 0.125, shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.5, 1.5, shape) * (3 if "post_" in name else 1), jnp.float32)

    return map_arrays(scramble, abstract(cfg))


@functools.cache
def answers(variant: str, layout: Layout | None, storage: Storage) -> tuple[list[int], np.ndarray]:
    """A greedy answer past three windows, behind a prompt of two chunks, and its log-probabilities."""
    machine = Engine(model_of(variant), slots=1, max_length=112, cache=CacheConfig(layout, storage), chunk=32)
    machine.reserve(112)
    prompt = np.random.default_rng(3).integers(3, 128, 45).tolist()
    running = machine.submit(Request(prompt, 60, Rule(temperature=0.0)))
    while machine.step():
        pass
    return running.tokens, np.asarray(running.logprobs)


@pytest.mark.parametrize("variant", ["tiny_26b_a4b", "tiny_31b"])
@pytest.mark.parametrize("layout", ["unified", "rotate_on_read"])
def test_layouts_give_the_same_text(variant: str, layout: Layout):
    plain, one = answers(variant, "plain", "compute"), answers(variant, layout, "compute")
    assert len(set(plain[0])) > 8
    assert plain[0] == one[0]
    np.testing.assert_allclose(plain[1], one[1], atol=1e-4)


def test_what_eight_bits_cost():
    """Every token read through the cache: other layouts change nothing, 8 bits a little."""
    tokens = np.random.default_rng(3).integers(3, 128, (3, 40)).astype(np.int32)
    formats = [
        CacheFormat(),
        CacheFormat("rotate_on_read"),
        CacheFormat("unified", "int8"),
        CacheFormat("plain", "fp8"),
    ]
    same, turned, int8, fp8 = losses(unroll(model_of("tiny_31b")), tokens, np.array([40, 7, 33], np.int32), formats)
    assert same[:2] == (0.0, 1.0)
    assert abs(turned[0]) < 1e-7
    assert 1e-7 < int8[0] < fp8[0] < 0.05
    assert int8[1] > 0.9


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("variant", ["26b_a4b", "31b", "tiny_31b"])
def test_bytes_are_those_of_the_arrays(variant: str, cache_format: CacheFormat):
    cfg = ModelConfig.variant(variant)
    for length in (1, 700, cfg.max_position_embeddings):
        found = request_bytes(cfg, length, "bfloat16", cache_format)
        assert found.total == allocated_bytes(cfg, length, "bfloat16", cache_format)


def test_the_longest_text_of_31b():
    cfg = ModelConfig.variant("31b")
    sizes = {
        layout: request_bytes(cfg, 262144, "bfloat16", CacheFormat.of(cfg, layout))
        for layout in ("plain", "unified", "rotate_on_read", None)
    }
    assert sizes["rotate_on_read"].full == 10 * GIB
    assert (sizes["plain"].full, sizes["unified"].full) == (20 * GIB, 12.5 * GIB)
    assert sizes[None] == sizes["unified"]
    assert all(one.sliding <= 0.8 * GIB for one in sizes.values())
    cache = jax.eval_shape(
        lambda: empty_cache(cfg, 1, 262144, "bfloat16", cache_format=CacheFormat.of(cfg, "rotate_on_read"))
    )
    full = [parts for kind, parts in zip(cfg.layer_kinds, cache.layers, strict=True) if kind == "full"]
    assert sum(x.size * 2 for x in jax.tree.leaves(full)) <= 10 * GIB


@pytest.mark.parametrize(("variant", "ratio"), [("e2b", 0.15), ("e4b", 0.17)])
def test_shared_layers_against_a_cache_for_every_layer(variant: str, ratio: float):
    """google-deepmind/gemma's `init_cache` (gemma4/_config.py) gives every layer k and v of the whole length by default."""
    cfg, length = ModelConfig.variant(variant), 131072
    theirs = sum(2 * 2 * length * cfg.kv_heads(kind) * cfg.head_size(kind) for kind in cfg.layer_kinds)
    assert allocated_bytes(cfg, length, "bfloat16", CacheFormat()) <= ratio * theirs


def test_how_many_requests_fit():
    cfg = ModelConfig.variant("31b")
    form = CacheFormat.of(cfg, None, "int8")
    one = request_bytes(cfg, 8192, "bfloat16", form).total
    assert fits(cfg, 10 * one + 5, 8192, "bfloat16", form) == 10
    assert token_bytes(cfg, "bfloat16", form, "beyond") == 10 * 4 * (640 + 2 * 4) + 4
    assert token_bytes(cfg, "bfloat16", form, "within") > 10 * token_bytes(cfg, "bfloat16", form, "beyond")
    text = report(cfg, 64 * GIB, "bfloat16", form)
    assert "unified full layers in int8; a token takes" in text
    assert "262,144" in text


def test_layouts_that_a_model_cannot_have():
    cfg = ModelConfig.variant("tiny_e2b")
    assert CacheFormat.of(cfg) == CacheFormat("plain")
    with pytest.raises(UserError, match=r"cache\.layout=unified stores values that are keys at once"):
        CacheConfig("unified").format(cfg)
    with pytest.raises(UserError, match=r"cache\.prefix_mb is 0"):
        CacheConfig(prefix_mb=-1)
    assert dataclasses.replace(CacheConfig(), storage="int8").format(cfg).storage == "int8"

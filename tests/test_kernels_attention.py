"""The fast attention kernels give the numbers and gradients of the reference, in memory that grows linearly with T."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels import reference
from gemma4_jax.kernels.banded import banded_spans, block_rows
from gemma4_jax.kernels.blockwise import Labels, causal_spans
from gemma4_jax.kernels.chunked import chunked_attention
from gemma4_jax.kernels.sequence import sequence_attention

# Two orders of float32 summation over at most 200 keys with values of order 1.
FLOAT32_TOLERANCE = 2e-5
# One bf16 rounding of the probabilities, one of the output: 2^-8 relative each, values of order 1.
BF16_TOLERANCE = 3e-2


def arrays(length, keys=None, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32, batch=5):
    keys = length if keys is None else keys
    shapes = [(batch, length, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim)]
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes]


def layout(length):
    """(positions, segment ids), int32 [5, length]: plain, padded left, padded right, only padding, packed."""
    positions = np.tile(np.arange(length, dtype=np.int32), (5, 1))
    segments = np.ones_like(positions)
    pad = length // 3
    positions[1] -= pad
    positions[1, :pad] = -1
    positions[2, length - pad :] = -1
    positions[3] = -1
    cuts = [0, length // 5, length // 2, length - length // 7]
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        positions[4, a:b] = np.arange(b - a)
        segments[4, a:b] = number + 1
    positions[4, cuts[-1] :] = -1
    segments[4, cuts[-1] :] = 0
    return jnp.asarray(positions), jnp.asarray(segments)


def assert_same(kernel, twin, inputs, labels, tolerance):
    """Values and the three gradients agree, and nothing is NaN."""
    weight = jnp.asarray(np.random.default_rng(7).standard_normal(inputs[0].shape, np.float32))

    def value_and_gradients(attention):
        def loss(q, k, v):
            out = attention(q, k, v, *labels)
            assert out.dtype == q.dtype
            assert out.shape == q.shape
            return (out.astype(jnp.float32) * weight).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return (out, *gradients)

    got, wanted = value_and_gradients(kernel), value_and_gradients(twin)
    for name, a, b in zip(("output", "d_q", "d_k", "d_v"), got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


def banded(q, k, v, *labels, window):
    """Sliding attention as the model calls it, which on a CPU is blocks of a band where the sequence is longer than the window."""
    return sequence_attention(q, k, v, Labels(*labels, *[None] * (4 - len(labels))), window=window)


# block_rows(8) is 64: 1 and 63 stay in one block, 200 leaves a rest, 192 divides evenly.
@pytest.mark.parametrize(("length", "window"), [(1, 8), (63, 80), (192, 64), (200, 1), (200, 65)])
def test_banded_matches_reference(length, window):
    positions, segments = layout(length)
    labels = (positions, positions, segments, segments)
    assert_same(
        functools.partial(banded, window=window),
        functools.partial(reference.attention, window=window),
        arrays(length),
        labels,
        FLOAT32_TOLERANCE,
    )


@pytest.mark.parametrize(("length", "chunk", "window"), [(1, 16, None), (16, 16, None), (67, 4, None), (40, 32, 5)])
def test_chunked_matches_reference_on_a_sequence(length, chunk, window):
    positions, segments = layout(length)
    labels = (positions, positions, segments, segments)
    assert_same(
        functools.partial(chunked_attention, window=window, chunk=chunk),
        functools.partial(reference.attention, window=window),
        arrays(length),
        labels,
        FLOAT32_TOLERANCE,
    )


@pytest.mark.parametrize(("length", "window"), [(1, None), (5, 7), (37, None)])
def test_chunked_matches_reference_against_a_ring(length, window):
    """Keys lie at slot = position % size, partly empty, and queries continue where the row's keys end."""
    size = 64
    last = np.array([90, 40])
    slots = np.arange(size)
    k_pos = np.stack([n - (n - slots) % size for n in last]).astype(np.int32)
    k_pos[k_pos < 0] = -1
    q_pos = (last[:, None] - length + 1 + np.arange(length)).astype(np.int32)
    q_pos[1, 0] = -1
    assert_same(
        functools.partial(chunked_attention, window=window, chunk=16),
        functools.partial(reference.attention, window=window),
        arrays(length, keys=size, batch=2),
        (jnp.asarray(q_pos), jnp.asarray(k_pos)),
        FLOAT32_TOLERANCE,
    )


@pytest.mark.parametrize(
    ("kernel", "heads", "kv_heads"),
    [
        (functools.partial(banded, window=20), 4, 1),
        (functools.partial(chunked_attention, chunk=40), 6, 2),
    ],
)
def test_head_groupings_and_bfloat16(kernel, heads, kv_heads):
    positions, segments = layout(70)
    assert_same(
        kernel,
        functools.partial(reference.attention, window=kernel.keywords.get("window")),
        arrays(70, heads=heads, kv_heads=kv_heads, dtype=jnp.bfloat16),
        (positions, positions, segments, segments),
        BF16_TOLERANCE,
    )


def test_composes_with_scan_checkpoint_and_vmap():
    positions, _ = layout(40)
    positions = positions[:3]
    q, k, v = arrays(40, kv_heads=4, batch=3)

    def loss(attention, q, k, v):
        layer = jax.checkpoint(lambda x, _: (attention(x, k, v, positions, positions) + x, None))
        return jax.lax.scan(layer, q, None, length=2)[0].sum()

    got = jax.jit(jax.grad(functools.partial(loss, functools.partial(banded, window=9))))(q, k, v)
    wanted = jax.jit(jax.grad(functools.partial(loss, functools.partial(reference.attention, window=9))))(q, k, v)
    np.testing.assert_allclose(got, wanted, atol=FLOAT32_TOLERANCE * 10, rtol=0)

    def one(q, k, v, p):
        return chunked_attention(q[None], k[None], v[None], p[None], p[None], chunk=16)[0]

    mapped = jax.jit(jax.vmap(one))(q, k, v, positions)
    wanted = reference.attention(q, k, v, positions, positions, window=None)
    np.testing.assert_allclose(mapped, wanted, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("length", "window"), [(4096, 512), (4100, 512), (100, 512), (70_000, 1024), (9000, 4096)])
def test_banded_work_is_proportional_to_the_window(length, window):
    rows = block_rows(window)
    spans = banded_spans(length, window, rows)
    assert sum(s.rows * s.count for s in spans) == length
    # window - 1 + rows keys per query, and the ramp at the start, which is shorter than a window and a block.
    limit = length * (window + rows) + (window + rows) ** 2
    assert sum(s.rows * s.count * s.k_len for s in spans) <= limit
    assert len(spans) <= 10


def test_causal_work_is_little_more_than_half():
    spans = causal_spans(8192, 128)
    assert sum(s.rows * s.count * s.k_len for s in spans) <= 0.57 * 8192**2
    assert len(spans) == 8


@pytest.mark.parametrize(
    "kernel", [functools.partial(banded, window=64), functools.partial(chunked_attention, chunk=128)]
)
def test_memory_grows_linearly(kernel):
    """Temporary memory of forward and backward at 4 T is 4 times that at T, not 16 times."""

    def temporary_bytes(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 1, 1))
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, p):
            return kernel(q, k, v, p, p).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, positions).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    short, long = temporary_bytes(512), temporary_bytes(2048)
    assert long <= 5 * short
    # Less than half of what the float32 scores of the four heads alone would take.
    assert long < 4 * 2048 * 2048 * 4 / 2


def test_wrong_shapes_are_refused():
    positions, _ = layout(8)
    q, k, v = arrays(8)
    with pytest.raises(ValueError, match="as many keys as queries"):
        banded(q, k[:, :4], v[:, :4], positions, positions[:, :4], window=4)
    with pytest.raises(ValueError, match="at least 1"):
        banded(q, k, v, positions, positions, window=0)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        chunked_attention(q[:, :, :3], k, v, positions, positions)
    with pytest.raises(ValueError, match="at least 1 query"):
        chunked_attention(q, k, v, positions, positions, chunk=0)

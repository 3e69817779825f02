"""Attention in which the tokens of an image see the whole image: XLA's kernels against the reference mask, with gradients."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.kernels import reference
from gemma4_jax.kernels.banded import banded_spans
from gemma4_jax.kernels.blockwise import Labels, causal_spans
from gemma4_jax.kernels.choice import Shape, kernel_choice
from gemma4_jax.kernels.chunked import chunked_attention
from gemma4_jax.kernels.sequence import sequence_attention
from gemma4_jax.model.attend import attend
from gemma4_jax.model.kv import KV
from gemma4_jax.model.multimodal import last_seen
from gemma4_jax.sharding import make_mesh

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def images_in(length: int, blocks: list[tuple[int, int]], packed: int | None = None) -> tuple[np.ndarray, ...]:
    """positions, segments, block ids [1, T]: images are (start, stop) slots; a second sequence begins at `packed`."""
    positions, segments = np.arange(length), np.ones(length, np.int64)
    if packed is not None:
        positions[packed:] -= packed
        segments[packed:] = 2
    ids = np.zeros(length, np.int64)
    for number, (start, stop) in enumerate(blocks, 1):
        ids[start:stop] = number
    return tuple(x.astype(np.int32)[None] for x in (positions, segments, ids))


def reference_mask(positions: np.ndarray, segments: np.ndarray, ids: np.ndarray, window: int) -> np.ndarray:
    """(causal or same image) and inside the window and the same sequence, written down pair by pair."""
    length = positions.shape[1]
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(length):
            same = ids[0, i] == ids[0, j] > 0
            p, q = positions[0, i], positions[0, j]
            mask[i, j] = segments[0, i] == segments[0, j] and (q <= p or same) and q > p - window
    return mask


CASES = {
    "two images": (150, 32, [(5, 30), (60, 75)], None),
    "an image longer than the window": (150, 16, [(20, 110)], None),
    "images at both ends": (150, 16, [(0, 40), (100, 150)], None),
    "packed, images at the border": (150, 32, [(40, 80), (80, 100), (101, 130)], 80),
    "everything in the window": (40, 64, [(3, 30)], None),
    "blocks of several kinds": (700, 40, [(10, 90), (300, 420), (650, 700)], 421),
}


@pytest.mark.parametrize("case", CASES)
def test_the_end_of_the_image_says_what_is_seen(case):
    length, window, blocks, packed = CASES[case]
    positions, segments, ids = images_in(length, blocks, packed)
    last = last_seen(jnp.asarray(ids), jnp.asarray(positions))
    seen = reference.visible_pairs(positions, positions, segments, segments, last, window=window)
    np.testing.assert_array_equal(np.asarray(seen)[0], reference_mask(positions, segments, ids, window))


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_the_reference_with_gradients(case):
    length, window, blocks, packed = CASES[case]
    positions, segments, ids = (jnp.asarray(x) for x in images_in(length, blocks, packed))
    last = last_seen(ids, positions)
    rng = np.random.default_rng(len(case))
    shapes = [(1, length, HEADS, HEAD_DIM), (1, length, KV_HEADS, HEAD_DIM), (1, length, KV_HEADS, HEAD_DIM)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    weight = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)
    labels = Labels(positions, positions, segments, segments, last)
    ahead = max(stop - start for start, stop in blocks)

    def kernel(q, k, v):
        return sequence_attention(q, k, v, labels, window=window, ahead=ahead)

    def twin(q, k, v):
        return reference.attention(q, k, v, *labels, window=window)

    def causal(q, k, v):
        return reference.attention(q, k, v, *labels[:4], window=window)

    def both(f):
        return quick.jit(jax.value_and_grad(lambda *x: (f(*x) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)

    (got, got_grads), (wanted, grads), (other, _) = both(kernel), both(twin), both(causal)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert abs(wanted - other) > 0.1
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "window", "ahead"), [(4096, 512, 280), (4100, 512, 1120), (700, 64, 700), (90, 64, 3)]
)
def test_spans_cover_each_query_once_and_hold_what_it_sees(length, window, ahead):
    for spans in (banded_spans(length, window, 64, ahead), causal_spans(length, 64, ahead)):
        covered = []
        for span in spans:
            for i in range(span.count):
                q_at, k_at = span.q_start + i * span.rows, span.k_start + i * span.k_stride
                covered += range(q_at, q_at + span.rows)
                assert 0 <= k_at <= max(0, q_at - (window - 1))
                assert min(length, q_at + span.rows + ahead) <= k_at + span.k_len <= length
        assert covered == list(range(length))


def test_queries_against_a_cache_see_ahead_too():
    """A chunk that holds a whole image, written into a ring before its queries run."""
    positions, _, ids = images_in(100, [(70, 95)])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 100, HEADS, HEAD_DIM)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, 100, KV_HEADS, HEAD_DIM)), jnp.float32) for _ in range(2))
    last = last_seen(jnp.asarray(ids), jnp.asarray(positions))
    wanted = reference.attention(q, k, v, positions, positions, None, None, last, window=24)[:, 60:]
    ring = np.roll(np.arange(100), 17)
    out = chunked_attention(
        q[:, 60:], k[:, ring], v[:, ring], positions[:, 60:], positions[:, ring], q_last_BT=last[:, 60:], window=24
    )
    np.testing.assert_allclose(out, wanted, atol=2e-6)


def test_images_across_devices_of_a_context_mesh():
    positions, segments, ids = (jnp.asarray(x) for x in images_in(128, [(20, 60), (90, 100)], 61))
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((1, 128, HEADS, HEAD_DIM)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, 128, KV_HEADS, HEAD_DIM)), jnp.float32) for _ in range(2))
    last = last_seen(ids, positions)
    wanted = reference.attention(q, k, v, positions, positions, segments, segments, last, window=16)
    with jax.set_mesh(make_mesh({"context": 4, "tensor": 2})):
        kv = KV(k, v, positions, segments)
        out = quick.jit(lambda q, kv: attend(q, kv, positions, segments, 16, last, 40))(q, kv)
    np.testing.assert_allclose(out, wanted, atol=2e-6)


def test_splash_is_for_text():
    text = Shape(8192, 8192, 256, 1024, True)
    seeing = Shape(8192, 8192, 256, 1024, True, ahead=280)
    assert kernel_choice("tpu", text) == "splash"
    assert kernel_choice("tpu", seeing) == kernel_choice("cpu", seeing) == "banded"


def test_ahead_and_last_go_together():
    x = jnp.zeros((1, 8, 2, 4))
    at = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="go together"):
        sequence_attention(x, x, x, Labels(at, at, None, None, at), window=4)

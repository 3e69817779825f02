"""Splash attention, interpreted on the CPU, gives the numbers and gradients of the reference; schedules visit what is seen."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels import reference, sequence
from gemma4_jax.kernels.blockwise import Labels
from gemma4_jax.kernels.choice import EVERYWHERE, Shape, kernel_choice
from gemma4_jax.kernels.sequence import ATTENTION, sequence_attention
from gemma4_jax.kernels.splash import block_sizes, splash_backward, splash_forward, visits
from gemma4_jax.model.attend import attend, share
from gemma4_jax.model.kv import KV

# Two orders of float32 summation over at most 640 keys with values of order 1.
FLOAT32_TOLERANCE = 2e-5
# One bf16 rounding of the probabilities, one of the output: 2^-8 relative each, values of order 1.
BF16_TOLERANCE = 3e-2


@pytest.fixture
def interpreted(monkeypatch):
    """The branch for TPU runs, in Pallas's interpreter."""
    monkeypatch.setattr(sequence, "_by_platform", lambda place, splash, xla, *args: splash(*args))
    monkeypatch.setattr(sequence, "splash_forward", functools.partial(splash_forward, interpret=True))
    monkeypatch.setattr(sequence, "splash_backward", functools.partial(splash_backward, interpret=True))


def layout(length):
    """(positions, segment ids), int32 [3, length]: padded left, padded right, packed with padding between and behind."""
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    segments = np.ones_like(positions)
    pad = length // 3
    positions[0] = np.maximum(positions[0] - pad, -1)
    positions[1, length - pad :] = -1
    positions[2], segments[2] = -1, 0
    cuts = [0, length // 5, length // 2 + 3, length - length // 7]
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        positions[2, a : b - 2] = np.arange(b - 2 - a)
        segments[2, a:b] = number
    return jnp.asarray(positions), jnp.asarray(segments)


def arrays(length, heads, kv_heads, dtype=jnp.float32, head_dim=128, batch=3):
    rng = np.random.default_rng(0)
    scales = head_dim**-0.25, head_dim**-0.25, 1.0  # scores of order 1
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [
        jnp.asarray((rng.standard_normal(s, np.float32) * np.float32(c)).astype(dtype))
        for s, c in zip(shapes, scales, strict=True)
    ]


def outputs_and_gradients(attention, q, k, v):
    weight = jnp.asarray(np.random.default_rng(7).standard_normal(q.shape, np.float32))

    def loss(q, k, v):
        out = attention(q, k, v)
        return (out.astype(jnp.float32) * weight).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


# 640 = 5 x 128: no larger block divides it, so five blocks of queries meet five of keys.
@pytest.mark.parametrize(
    ("window", "heads", "segmented", "dtype", "tolerance"),
    [
        (None, 4, True, jnp.float32, FLOAT32_TOLERANCE),
        (200, 2, True, jnp.float32, FLOAT32_TOLERANCE),
        (128, 2, False, jnp.bfloat16, BF16_TOLERANCE),
    ],
)
def test_matches_reference(interpreted, window, heads, segmented, dtype, tolerance):
    positions, segments = layout(640)
    qkv = arrays(640, heads, heads // 2, dtype)
    if not segmented:  # the row of several documents needs segment ids
        positions, segments, qkv = positions[:2], None, [x[:2] for x in qkv]
    labels = Labels(positions, positions, segments, segments)
    got = outputs_and_gradients(lambda q, k, v: sequence_attention(q, k, v, labels, window=window), *qkv)
    wanted = outputs_and_gradients(lambda q, k, v: reference.attention(q, k, v, *labels, window=window), *qkv)
    for name, a, b in zip(("output", "d_q", "d_k", "d_v"), got, wanted, strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("starts", "device", "window"),
    [
        (((384,),), None, 200),  # keys of a halo before the queries
        (((0,), (128,), (256,), (384,)), 2, None),  # a share in the middle of all keys
        (((0, 896), (256, 640)), 1, None),  # a share in two pieces
    ],
)
def test_queries_anywhere_among_the_keys(interpreted, starts, device, window):
    length = {1: 256, 4: 128, 2: 256}[len(starts)]
    keys = {1: 640, 4: 512, 2: 1024}[len(starts)]
    mine = starts[device or 0]
    slots = np.concatenate([np.arange(first, first + length // len(mine)) for first in mine])
    positions, segments = layout(keys)
    labels = Labels(positions[:, slots], positions, segments[:, slots], segments)
    q, k, v = arrays(keys, 2, 1)
    q = q[:, slots]
    device = None if device is None else jnp.int32(device)
    got = outputs_and_gradients(
        lambda q, k, v: sequence_attention(q, k, v, labels, window=window, starts=starts, device=device), q, k, v
    )
    wanted = outputs_and_gradients(lambda q, k, v: reference.attention(q, k, v, *labels, window=window), q, k, v)
    for name, a, b in zip(("output", "d_q", "d_k", "d_v"), got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32_TOLERANCE * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("starts", "piece", "keys", "window"),
    [
        (((0,),), 24, 24, None),
        (((0,),), 24, 24, 5),
        (((8,),), 16, 24, 6),
        (((0,), (12,)), 12, 24, None),
        (((0, 36), (12, 24)), 12, 48, None),
    ],
)
def test_a_schedule_visits_what_is_seen(starts, piece, keys, window, by_key):
    """Blocks of 4 queries and 3 keys, against the mask itself."""
    following, active = visits(starts, piece, keys, window, 4, 3, by_key=by_key)
    for device, firsts in enumerate(starts):
        q = np.concatenate([np.arange(first, first + piece) for first in firsts])[:, None]
        seen = (np.arange(keys) <= q) & (np.arange(keys) > q - (window or keys))
        blocks = seen.reshape(len(q) // 4, 4, keys // 3, 3).any(axis=(1, 3))
        table, on = following[device], active[device]
        if by_key:
            blocks, table, on = blocks.T, table.T, on.T
        for row, needed in enumerate(blocks):
            np.testing.assert_array_equal(table[row][on[row] == 1], np.flatnonzero(needed))
        assert (table >= 0).all()
        assert (table < blocks.shape[1]).all()
        assert (on.sum(axis=1) <= table.shape[1]).all()
    steps = active.sum(axis=1 if by_key else 2).max()
    assert following.shape[1 if by_key else 2] == steps  # none idle for all


def test_schedules_of_long_sequences_are_quick_and_small():
    """262144 tokens: under a second, and within the 1 MiB of scalar memory."""
    start = time.perf_counter()
    for window, head_dim in ((None, 512), (1024, 256)):
        sizes = block_sizes(head_dim, 2, window, 262144, 262144)
        tables = visits(((0,),), 262144, 262144, window, sizes.forward_q, sizes.kv, by_key=False)
        assert sum(table.nbytes for table in tables) < 2**20 / 2
        steps = tables[0].shape[2]
        assert steps == (262144 // sizes.kv if window is None else 3)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("length", [128, 640, 4224, 8192])
@pytest.mark.parametrize(("head_dim", "itemsize", "window"), [(256, 2, 512), (512, 2, None), (512, 4, None)])
def test_blocks_divide_their_lengths(length, head_dim, itemsize, window):
    sizes = block_sizes(head_dim, itemsize, window, length, 2 * length)
    for rows in (sizes.forward_q, sizes.q):
        assert rows % 128 == length % rows == 0
    assert sizes.kv % 128 == 2 * length % sizes.kv == 0
    wanted = {(512, 2): (512, 512, 512), (None, 2): (1024, 512, 512), (None, 4): (512, 256, 256)}[window, itemsize]
    assert length != 8192 or sizes == wanted


def test_the_table():
    sliding = Shape(length=8192, keys=8192, head_dim=256, window=1024, aligned=True)
    full = Shape(length=8192, keys=8192, head_dim=512, window=None, aligned=True)
    cache = Shape(length=1, keys=8192, head_dim=512, window=None, aligned=False)
    odd = Shape(length=100, keys=100, head_dim=256, window=64, aligned=True)
    short = Shape(length=64, keys=64, head_dim=256, window=64, aligned=True)
    for platform in (*EVERYWHERE, "gpu"):
        fast = platform == "tpu"
        assert kernel_choice(platform, sliding) == ("splash" if fast else "banded")
        assert kernel_choice(platform, full) == ("splash" if fast else "chunked")
        assert kernel_choice(platform, cache) == "chunked"
        assert kernel_choice(platform, odd) == "banded"
        assert kernel_choice(platform, short) == "chunked"
    halo = share(8200, 8200, 256, 1024, aligned=True, context=4)
    everything = share(1200, 1200, 256, 1024, aligned=True, context=4)
    assert kernel_choice("cpu", halo) == "banded"
    assert kernel_choice("cpu", everything) == "chunked"
    with pytest.raises(ValueError, match="platform is one of tpu"):
        kernel_choice("vulkan", full)


def test_what_a_device_computes():
    """The shapes that `kernel_choice` is asked about, as `attend` makes them."""
    assert share(8192, 8192, 256, 1024, aligned=True) == Shape(8192, 8192, 256, 1024, True)
    assert share(8192, 8192, 512, None, aligned=True, context=4) == Shape(2048, 8192, 512, None, True)
    assert share(8192, 8192, 256, 1024, aligned=True, context=4) == Shape(2048, 1024 + 2048, 256, 1024, True)
    assert share(8200, 8200, 256, 1024, aligned=True, context=4) == Shape(2050, 1023 + 2050, 256, 1024, True)
    assert share(1024, 1024, 256, 1024, aligned=True, context=4) == Shape(256, 1024, 256, 1024, True)
    assert share(1, 4096, 512, None, aligned=False, context=4) == Shape(1, 1024, 512, None, False)
    assert share(8190, 8190, 512, None, aligned=True, context=4) == Shape(8190, 8190, 512, None, True)


def kernels_lowered(platform, policy, length):
    """Names of the Pallas kernels in forward and backward of a rematerialised layer, lowered on this machine."""
    q, k = (jax.ShapeDtypeStruct((2, length, n, 256), jnp.bfloat16) for n in (4, 2))
    positions = jax.ShapeDtypeStruct((2, length), jnp.int32)

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(q, k, v, positions):
        return jnp.sin(attend(q, KV(k, v, positions), positions, None, 128))

    def step(q, k, v, positions):
        out, pull = jax.vjp(lambda *qkv: layer(*qkv, positions), q, k, v)
        return pull(out)

    text = jax.jit(step).trace(q, k, k, positions).lower(lowering_platforms=(platform,)).as_text()
    names = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")
    return [text.count(f'kernel_name = "{name}_segmented') for name in names], text.count("tpu_custom_call")


def test_the_kernel_is_chosen_when_lowering():
    """From a CPU: splash for TPU, nothing of it elsewhere; a policy that keeps ATTENTION saves the second forward pass."""
    nothing, named = (
        jax.checkpoint_policies.nothing_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    )
    assert kernels_lowered("tpu", nothing, 512) == ([2, 1, 1], 4)
    assert kernels_lowered("tpu", named, 512) == ([1, 1, 1], 3)
    assert kernels_lowered("cuda", nothing, 512) == ([0, 0, 0], 0)
    assert kernels_lowered("tpu", nothing, 500) == ([0, 0, 0], 0)

"""Attention on a mesh gives the numbers and gradients of attention without one; nothing that is cut gets gathered in vain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.kernels import sequence
from gemma4_jax.kernels.cached import Codes
from gemma4_jax.kernels.splash import splash_backward, splash_forward
from gemma4_jax.model import attend as attend_module
from gemma4_jax.model.attend import attend, check_heads
from gemma4_jax.model.kv import CACHE_DIMS, KV, slot_of, write, write_positions
from gemma4_jax.model.layouts import View
from gemma4_jax.sharding import activation_spec, make_mesh

# Orders of float32 summation differ: over keys, and over the devices that share them.
TOLERANCE = 2e-5


def mesh_of(**sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def layout(batch, length):
    """(positions, segment ids), int32 [B, T]: rows in turn plain, padded left, padded right, packed with a padded tail."""
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    segments = np.ones_like(positions)
    pad = length // 3
    positions[1::4] = np.maximum(positions[1::4] - pad, -1)
    positions[2::4, length - pad :] = -1
    cut, tail = length // 2 - 3, length - length // 7
    positions[3::4, cut:tail] -= cut
    segments[3::4, cut:tail] = 2
    positions[3::4, tail:] = -1
    segments[3::4, tail:] = 0
    return jnp.asarray(positions), jnp.asarray(segments)


def arrays(batch, length, keys, heads, kv_heads, head_dim):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim)]
    scales = head_dim**-0.25, head_dim**-0.25, 1.0  # scores of order 1
    return [
        jnp.asarray(rng.standard_normal(s, np.float32) * np.float32(c)) for s, c in zip(shapes, scales, strict=True)
    ]


def on_mesh(mesh, function, *args):
    """function(*args) under jit, on the mesh or (None) on one device."""
    if mesh is None:
        return jax.jit(function)(*args)
    with jax.set_mesh(mesh):
        return jax.jit(function)(*args)


def assert_same(mesh, windows, qkv, positions, segments):
    """Output and gradients for every window; the sum of the losses, so that one program is compiled per mesh."""
    weights = jnp.asarray(np.random.default_rng(7).standard_normal((len(windows), *qkv[0].shape), np.float32))

    def loss(q, k, v):
        kv = KV(k, v, positions, segments)
        outs = [attend(q, kv, positions, segments, window) for window in windows]
        return sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)), outs

    step = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, outs), gradients = on_mesh(mesh, step, *qkv)
    (_, wanted_outs), wanted_gradients = on_mesh(None, step, *qkv)
    for window, a, b in zip(windows, outs, wanted_outs, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0, err_msg=f"window {window}")
    for name, a, b in zip(("d_q", "d_k", "d_v"), gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "batch", "heads", "kv_heads"),
    [
        (dict(data=4, fsdp=2), 8, 2, 1),
        (dict(fsdp=2), 3, 2, 1),  # a batch that the axes do not divide stays whole
        (dict(tensor=4), 2, 8, 4),
        (dict(tensor=4), 2, 8, 2),
        (dict(tensor=4), 2, 4, 1),
        (dict(context=4), 4, 2, 1),
        (dict(fsdp=2, context=2, tensor=2), 4, 4, 2),
    ],
)
def test_a_sequence_on_a_mesh(sizes, batch, heads, kv_heads):
    """Windows shorter and longer than a device's 16 of 64 slots, one that reaches over all, more than a halo, and none."""
    length = 64
    windows = {4: (9, 40, 49, 63, None), 2: (9, 40, None), 1: (9, None)}[sizes.get("context", 1)]
    qkv = arrays(batch, length, length, heads, kv_heads, 8)
    assert_same(mesh_of(**sizes), windows, qkv, *layout(batch, length))


def test_without_segments_on_a_mesh():
    """75 slots on each of two devices: a block of 64 queries and a rest."""
    positions, _ = layout(3, 150)
    assert_same(mesh_of(context=2), (40, None), arrays(3, 150, 150, 2, 1, 8), positions, None)


@pytest.mark.parametrize("balance_from", [10**9, 0])
def test_the_tpu_kernel_over_context(monkeypatch, balance_from):
    """The branch that only a TPU lowers, interpreted: halo, keys of all devices, and queries dealt out evenly."""
    calls = []

    def interpreted(place, splash, xla, *args):
        calls.append(place)
        return splash(*args)

    monkeypatch.setattr(sequence, "_by_platform", interpreted)
    monkeypatch.setattr(sequence, "splash_forward", functools.partial(splash_forward, interpret=True))
    monkeypatch.setattr(sequence, "splash_backward", functools.partial(splash_backward, interpret=True))
    monkeypatch.setattr(attend_module, "BALANCE_FROM", balance_from)
    windows = (None,) if balance_from == 0 else (150, None)
    assert_same(mesh_of(context=2), windows, arrays(4, 512, 512, 2, 1, 128), *layout(4, 512))
    pieces = {len(place.starts[0]) for place in calls if len(place.starts) == 2}
    assert pieces == ({2} if balance_from == 0 else {1})


def cache(batch, size, tokens, heads, kv_heads, ahead):
    """Queries that continue, and a ring of `size` slots, the first rows not yet full."""
    q, k, v = arrays(batch, ahead, size, heads, kv_heads, 8)
    last = tokens - 3 * np.arange(batch)
    slots = np.arange(size)
    k_pos = np.stack([n - (n - slots) % size for n in last]).astype(np.int32)
    k_pos[k_pos < 0] = -1
    q_pos = (last[:, None] - ahead + 1 + np.arange(ahead)).astype(np.int32)
    q_pos[0, 0] = -1
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(q_pos), jnp.asarray(k_pos)


def view(k, v, positions, window):
    """A plain layer's cache; one with a window may be a ring."""
    kind = "sliding" if window else "full"
    return View(
        {"k": Codes(k), "v": Codes(v)}, positions, None, None, None, ModelConfig.variant("tiny_e2b"), kind, "plain"
    )


@pytest.mark.parametrize(
    ("sizes", "batch", "kv_heads"),
    [
        (dict(tensor=2), 1, 2),
        (dict(tensor=4), 1, 2),  # more devices than heads: they share out the slots
        (dict(context=4), 3, 1),
        (dict(fsdp=2, context=2, tensor=2), 2, 1),
    ],
)
def test_decoding_on_a_mesh(sizes, batch, kv_heads):
    mesh = mesh_of(**sizes)
    q, k, v, q_pos, k_pos = cache(batch, 32, 20, 4, kv_heads, ahead=2)  # not yet a ring: slots are positions

    def decode(q, k, v):
        return [attend(q, view(k, v, k_pos, window), q_pos, None, window) for window in (7, None)]

    for a, b in zip(on_mesh(mesh, decode, q, k, v), on_mesh(None, decode, q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


def test_a_cache_cut_over_context_is_never_gathered():
    mesh = mesh_of(context=4, tensor=2)
    q, k, v, q_pos, k_pos = cache(1, 64, 60, 4, 2, ahead=1)

    def step(q, k, v, k_pos, new):
        slot = slot_of(q_pos, k.shape[2])
        new = {"k": Codes(new), "v": Codes(new)}
        stored = write({"k": Codes(k), "v": Codes(v)}, slot, new)
        k, v, k_pos = stored["k"].values, stored["v"].values, write_positions(k_pos, slot, q_pos)
        return attend(q, view(k, v, k_pos, None), q_pos, None, None), k, v, k_pos

    def shardings(*arrays):
        dims = [CACHE_DIMS if x.ndim == 4 else ("batch", "slots") for x in arrays]
        return tuple(NamedSharding(mesh, activation_spec(mesh, d, x.shape)) for d, x in zip(dims, arrays, strict=True))

    new = k[:, :, :1].swapaxes(1, 2) * 2.0
    cut = shardings(k, v, k_pos)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(step, in_shardings=(None, *cut, None), out_shardings=(None, *cut))
            .lower(q, k, v, k_pos, new)
            .compile()
        )
    text = compiled.as_text() or ""
    assert "all-gather" not in text
    assert "collective-permute" not in text
    got = compiled(q, *jax.device_put((k, v, k_pos), cut), new)
    for a, b in zip(got, on_mesh(None, step, q, k, v, k_pos, new), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sizes", [dict(context=4), dict(data=2, context=2, tensor=2)])
def test_writes_on_a_mesh(sizes):
    """Slots on several devices in one write, padding (dropped), and slots the write itself overtakes."""
    rng = np.random.default_rng(1)
    slots, new = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 2, 16, 4), (2, 20, 2, 4)))
    positions = jnp.asarray(np.stack([np.arange(20) + 5, np.maximum(np.arange(20) - 12, -1)]), jnp.int32)
    slot = slot_of(positions, 16)
    where = jnp.full((2, 16), -1, jnp.int32)

    def both(slots, where):
        return write({"v": Codes(slots)}, slot, {"v": Codes(new)})["v"].values, write_positions(where, slot, positions)

    for a, b in zip(on_mesh(mesh_of(**sizes), both, slots, where), on_mesh(None, both, slots, where), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("tensor", "heads", "kv_heads"), [(3, 8, 2), (8, 8, 3), (4, 24, 6), (16, 8, 2)])
def test_heads_that_cannot_be_shared_out(tensor, heads, kv_heads):
    with pytest.raises(UserError, match=rf"mesh.tensor={tensor} cannot share out {heads} query heads"):
        check_heads(tensor, heads, kv_heads)


def test_a_halo_is_all_that_travels_for_a_window():
    """A window of 9 over 4 devices: no gather, and permutes of 8 slots."""
    mesh = mesh_of(context=4)
    q, k, v = arrays(1, 64, 64, 2, 1, 8)
    positions, _ = layout(1, 64)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, activation_spec(mesh, ("batch", "length", None, None), q.shape))
        lowered = jax.jit(
            lambda q, k, v: attend(q, KV(k, v, positions), positions, None, 9), in_shardings=(spec,) * 3
        ).lower(q, k, v)
        text = lowered.compile().as_text() or ""
    assert "all-gather" not in text
    assert "f32[1,8,1,8]" in text
    assert "collective-permute" in text

"""Attention of one layer on whatever mesh there is. Which kernel computes it stands in `kernels/choice.py`.

On a mesh the whole of it is one `shard_map`: batch over the axes of the batch, heads over `tensor`, slots over
`context`. Along `context`

| keys                | queries see            | what travels                                                          |
|---------------------|------------------------|-----------------------------------------------------------------------|
| the queries' tokens | a window               | the last window - 1 keys of the devices before, to the next           |
| the queries' tokens | everything before them | all keys to all devices; long sequences also balance their queries    |
| a cache             | either                 | each device's attention to its own slots, then a weighted sum of it   |

Where `tensor` has more devices than there are key/value heads these come whole. A device then reads one head of a
sequence, and all heads of its share of the slots of a cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from gemma4_jax.errors import UserError
from gemma4_jax.kernels.blockwise import Labels
from gemma4_jax.kernels.cached import Codes, Fresh, cached_attention
from gemma4_jax.kernels.choice import Shape
from gemma4_jax.kernels.context import merged, mirrored_halves, whole, with_halo
from gemma4_jax.kernels.sequence import sequence_attention
from gemma4_jax.kernels.splash import Starts
from gemma4_jax.model.kv import CACHE_DIMS, KV
from gemma4_jax.model.layouts import View
from gemma4_jax.sharding import activation_spec, axes_in, current_mesh, heads_divide, size_of

CONTEXT, TENSOR = "context", "tensor"

BALANCE_FROM = 32768
"""Tokens of a sequence from which full layers deal their queries out evenly.

In contiguous shares the last of n devices has 2 - 1/n times the mean work. Evening that out moves half of the queries and of the
outputs; for 31B over 4 chips of v6e that takes as long as it saves near 8192 tokens (67 MB at 100 GB/s against 0.9 ms at half the
peak: reckoned, not measured), and what it saves grows with the square.
"""


def attend(
    q_BTNH: jax.Array,
    source: KV | View,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    window: int | None,
    last_BT: jax.Array | None = None,
    ahead: int = 0,
) -> jax.Array:
    """softmax(q k^T) v over the keys each query may see; scale 1, no soft cap; shape and dtype of q.

    Padding (position -1) gives zeros. For a KV, positions inside a segment grow by one per slot. `last_BT` is the last
    position each query sees, at most `ahead` after its own (None: its own); what is in a cache lies before its queries.
    """
    if isinstance(source, View):
        return _to_cache(q_BTNH, source, positions_BT, window)
    labels = Labels(positions_BT, source.positions, segment_ids_BT, source.segment_ids, last_BT)
    mesh = current_mesh()
    if mesh is not None:
        return _on_mesh(mesh, q_BTNH, source, labels, window, ahead)
    starts = ((source.before,),)
    return sequence_attention(q_BTNH, source.k, source.v, labels, window=window, starts=starts, ahead=ahead)


def _on_mesh(mesh, q_BTNH: jax.Array, kv: KV, labels: Labels, window: int | None, ahead: int) -> jax.Array:
    heads, kv_heads, tensor = q_BTNH.shape[2], kv.k.shape[2], mesh.shape[TENSOR]
    check_heads(tensor, heads, kv_heads)
    length = None if kv.before else "length"
    q_spec = activation_spec(mesh, ("batch", length, "q_heads", None), q_BTNH.shape)
    k_spec = activation_spec(mesh, ("batch", length, "kv_heads", None), kv.k.shape)
    if labels.q_seg_BT is None or labels.k_seg_BS is None:
        labels = labels._replace(q_seg_BT=None, k_seg_BS=None)
    of_q, of_k = PartitionSpec(*q_spec[:2]), PartitionSpec(*k_spec[:2])
    of_segments = (None, None) if labels.q_seg_BT is None else (of_q, of_k)
    of_last = None if labels.q_last_BT is None else of_q

    def island(q, k, v, *labels):
        labels = Labels(*labels)
        own = functools.partial(_own_kv_heads, axis=2, local_heads=q.shape[2], groups=heads // kv_heads)
        k, v = own(k), own(v)
        if k_spec[1] is not None:
            return _over_context(q, k, v, labels, window, ahead)
        return sequence_attention(q, k, v, labels, window=window, starts=((kv.before,),), ahead=ahead)

    # Without `check_vma`: Pallas kernels do not say along which axes their results vary.
    specs = q_spec, k_spec, k_spec, of_q, of_k, *of_segments, of_last
    mapped = jax.shard_map(island, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return mapped(q_BTNH, kv.k, kv.v, *labels)


def _to_cache(q_BTNH: jax.Array, view: View, positions_BT: jax.Array, window: int | None) -> jax.Array:
    """Attention to what a cache holds; on a mesh each device looks at its own heads and slots."""
    mesh, queries = current_mesh(), view.queries(q_BTNH)
    dtype = q_BTNH.dtype
    if mesh is None:
        keys = lambda parts, positions: view.keys(parts, positions, view.key_scale, dtype)  # noqa: E731
        out, _ = cached_attention(
            queries,
            view.parts,
            keys,
            positions_BT,
            view.positions,
            window=window,
            rows=view.rows,
            fresh=view.fresh,
        )
        return view.output(out)
    parts = view.parts if view.rows is None else jax.tree.map(lambda x: x[view.rows], view.parts)
    heads, (_, kv_heads, slots) = q_BTNH.shape[2], parts["v"].values.shape[:3]
    check_heads(mesh.shape[TENSOR], heads, kv_heads)
    q_spec = activation_spec(mesh, ("batch", None, "q_heads", None), q_BTNH.shape)
    spec = activation_spec(mesh, CACHE_DIMS, parts["v"].values.shape)
    cut = axes_in(spec[2])
    local = slots // size_of(mesh, cut)
    split = kv_heads % mesh.shape[TENSOR] > 0 and local % mesh.shape[TENSOR] == 0

    def island(queries, parts, q_pos, k_pos, key_scale, fresh):
        start = jax.lax.axis_index(cut) * local if cut else 0
        axes = (*cut, TENSOR) if split else cut
        if split:
            queries, parts, k_pos, start = _slots_over_tensor(queries, parts, k_pos, start)
        else:
            own = functools.partial(_own_kv_heads, axis=1, local_heads=queries[0].shape[2], groups=heads // kv_heads)
            parts = jax.tree.map(own, parts)
            fresh = fresh and fresh._replace(parts=jax.tree.map(own, fresh.parts))
        if fresh is not None and axes:  # one device looks at what has no slot yet
            fresh = fresh._replace(positions=jnp.where(jax.lax.axis_index(axes) == 0, fresh.positions, -1))
        out, lse = cached_attention(
            queries,
            parts,
            lambda parts, positions: view.keys(parts, positions, key_scale, dtype),
            q_pos,
            k_pos,
            window=window,
            first=start,
            fresh=fresh,
        )
        out = merged(out, lse, axes) if axes else out
        if not split:
            return out
        mine = heads // jax.lax.axis_size(TENSOR)
        return jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(TENSOR) * mine, mine, axis=2)

    of_parts = jax.tree.map(lambda x: PartitionSpec(*spec[: x.ndim]), parts)
    of_pos: Any = PartitionSpec(q_spec[0], None), PartitionSpec(spec[0], spec[2])
    of_scale = None if view.key_scale is None else PartitionSpec(None)
    of_fresh = None
    if view.fresh is not None:
        of_fresh = Fresh(
            jax.tree.map(lambda x: PartitionSpec(*(spec[0], spec[1], None, None)[: x.ndim]), view.fresh.parts),
            of_pos[0],
        )
    in_specs = ((q_spec,) * len(queries), of_parts, *of_pos, of_scale, of_fresh)
    mapped = jax.shard_map(island, mesh=mesh, in_specs=in_specs, out_specs=q_spec, check_vma=False)
    return view.output(mapped(queries, parts, positions_BT, view.positions, view.key_scale, view.fresh))


def check_heads(tensor: int, heads: int, kv_heads: int) -> None:
    """Raises UserError if `tensor` devices cannot share these heads."""
    if not heads_divide(tensor, heads, kv_heads):
        raise UserError(
            f"mesh.tensor={tensor} cannot share out {heads} query heads and {kv_heads} key/value heads: it must divide the "
            "first, and divide the second or be a multiple of it. A power of two up to the query heads always fits."
        )


def _own_kv_heads(x: jax.Array, *, axis: int, local_heads: int, groups: int) -> jax.Array:
    """The key/value heads this device's queries read: one of all, where `tensor` has more devices than there are heads."""
    if x.shape[axis] * groups == local_heads:
        return x
    mine = jax.lax.axis_index(TENSOR) * local_heads // groups
    return jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=axis)


def _slots_over_tensor(queries: tuple[jax.Array, ...], parts: dict[str, Codes], k_pos_BS: jax.Array, start):
    """All heads of the queries, and this device's share of the slots of a cache that is whole on `tensor`.

    A device that took its own key/value head instead would read more of the cache: 1 / heads of it, not 1 / devices.
    Without the layout constraint XLA's TPU compiler turns the whole cache round, there and back, to cut its share out
    (0.125 GiB of temporaries for 32768 slots of 4 heads of 512, none with it).
    """
    devices, index = jax.lax.axis_size(TENSOR), jax.lax.axis_index(TENSOR)
    slots = k_pos_BS.shape[1] // devices

    def mine(x: jax.Array, axis: int) -> jax.Array:
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
        return jax.lax.dynamic_slice_in_dim(x, index * slots, slots, axis=axis)

    queries = tuple(jax.lax.all_gather(q, TENSOR, axis=2, tiled=True) for q in queries)
    return queries, jax.tree.map(lambda x: mine(x, 2), parts), mine(k_pos_BS, 1), start + index * slots


def _over_context(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, labels: Labels, window: int | None, ahead: int
) -> jax.Array:
    """A share of the queries against a halo or against all keys; k, v and labels are this device's own.

    Queries that see ahead get all keys: an image may go on on the devices after this one.
    """
    devices, length = jax.lax.axis_size(CONTEXT), q_BTNH.shape[1]
    halo = halo_slots(length, window, devices) if not ahead else None

    def fetch(x: jax.Array, fill: int = 0) -> jax.Array:
        return whole(x, CONTEXT) if halo is None else with_halo(x, CONTEXT, halo, fill)

    k, v, k_pos = fetch(k_BTKH), fetch(v_BTKH), fetch(labels.k_pos_BS, -1)
    k_seg = None if labels.k_seg_BS is None else fetch(labels.k_seg_BS)
    if halo is not None:
        labels = labels._replace(k_pos_BS=k_pos, k_seg_BS=k_seg)
        return sequence_attention(q_BTNH, k, v, labels, window=window, starts=((halo,),))

    deal = (lambda x: mirrored_halves(x, CONTEXT)) if balanced(length, devices) else (lambda x: x)
    q_seg = None if labels.q_seg_BT is None else deal(labels.q_seg_BT)
    q_last = None if labels.q_last_BT is None else deal(labels.q_last_BT)
    labels = Labels(deal(labels.q_pos_BT), k_pos, q_seg, k_seg, q_last)
    starts, device = query_starts(length, devices), jax.lax.axis_index(CONTEXT)
    return deal(
        sequence_attention(deal(q_BTNH), k, v, labels, window=window, starts=starts, device=device, ahead=ahead)
    )


def halo_slots(length: int, window: int | None, devices: int) -> int | None:
    """Keys that a device with `length` queries gets from those before it; None where it gets all there are."""
    if window is None:
        return None
    slots = window - 1 if length % 128 else -(-(window - 1) // 128) * 128  # whole lanes, as the TPU kernel wants them
    return slots if slots <= (devices - 1) * length else None


def balanced(length: int, devices: int) -> bool:
    """Whether devices with `length` queries each exchange half of them; halves are blocks of the TPU kernel."""
    return devices * length >= BALANCE_FROM and length % 256 == 0


def query_starts(length: int, devices: int) -> Starts:
    """Among all keys, where the queries of each device begin: `starts` of `kernels/splash.py`."""
    if not balanced(length, devices):
        return tuple((i * length,) for i in range(devices))
    half = length // 2
    return tuple((2 * i * half, (2 * (devices - i) - 1) * half) for i in range(devices))


def share(length: int, keys: int, head_dim: int, window: int | None, *, aligned: bool, context: int = 1) -> Shape:
    """What one of `context` devices computes of `length` queries and `keys` keys: the question to `kernel_choice`."""
    if context == 1 or keys % context or (aligned and length % context):
        return Shape(length, keys, head_dim, window, aligned)
    if not aligned:
        return Shape(length, keys // context, head_dim, window, aligned)
    length //= context
    halo = halo_slots(length, window, context)
    return Shape(length, keys if halo is None else halo + length, head_dim, window, aligned)

"""What one device does in a step, in closed form: FLOPs executed, HBM bytes, and collectives, as `costs.Totals`.

FLOPs and network bytes follow from the program's structure: which products a pass makes, what is gathered when. HBM bytes
of activations rest on how often each kind of array is read or written, which is a constant here.
"""

import dataclasses
import functools
import math

import numpy as np

from gemma4_jax.config import LayerKind, Stack
from gemma4_jax.kernels.expert_routes import ROOM
from gemma4_jax.model.attend import BALANCE_FROM
from gemma4_jax.model.kv import slots
from gemma4_jax.plan.costs import Collective, Totals
from gemma4_jax.plan.footprint import PER_LAYER_INPUTS
from gemma4_jax.plan.job import BYTES, Job
from gemma4_jax.plan.shares import Share, cache_bytes, device_groups
from gemma4_jax.sharding import ACTIVATIONS, AXES, VOCABULARY


@dataclasses.dataclass(frozen=True)
class Visits:
    """How often arrays go to or from HBM in one forward pass; a pass that recomputes does it again, a backward pass twice."""

    residual: float = 10.0  # [M, D]
    queries: float = 8.0  # [M, N H]
    ffw: float = 5.0  # [M, F]
    expert_rows: float = 6.0  # [R, D]
    logits: float = 6.0  # float32, of the loss


VISITS = Visits()

PASSES = {"none": 0, "save_projections": 0, "save_attention": 1, "full": 1, "offload": 1}
"""remat policy -> how often weight products run again."""

ATTENTION_KEPT = ("none", "save_attention")
"""Policies under which attention does not run again."""

ATTENTION_BACKWARD = 3.5
"""Of a forward pass: splash makes q k, do v and one product for dq, then four for dk and dv; 7 products to 2."""


class _Work:
    """Collects FLOPs, bytes and traffic of one job."""

    def __init__(self, job: Job):
        self.job = job
        self.flops = 0.0
        self.bytes = 0.0
        self.traffic: dict[tuple[str, tuple[str, ...]], float] = {}

    def send(self, kind: str, axes: tuple[str, ...], size: float, times: float = 1.0) -> None:
        """`times` collectives of `size` bytes, as `Collective.bytes` counts them."""
        axes = tuple(axis for axis in AXES if axis in axes and self.job.devices(axis) > 1)
        if axes and size and times:
            self.traffic[kind, axes] = self.traffic.get((kind, axes), 0.0) + size * times

    def totals(self, repeat: float) -> Totals:
        """Of the whole step, which runs `repeat` times what was collected."""
        collectives = []
        for (kind, axes), size in self.traffic.items():
            members = device_groups(self.job.sizes, axes)
            if kind == "collective-permute":
                pairs = _to_next(self.job.sizes, axes)
                collectives.append(Collective(kind, axes, 2, size, repeat, kind, "", "", pairs))
            else:
                collectives.append(Collective(kind, axes, members.shape[1], size, repeat, kind, "", "", members))
        return Totals({"bf16": self.flops * repeat}, self.bytes * repeat, collectives=collectives)


def workload(job: Job, visits: Visits = VISITS) -> Totals:
    """The totals of one step."""
    work = _Work(job)
    for stack, kind, layers in job.layer_kinds:
        _weights(work, stack, kind, layers)
        _attention(work, stack, kind, layers)
        _activations(work, visits, stack, kind, layers)
        _experts(work, visits, layers)
    _sums(work)
    _vocabulary(work, visits)
    total = work.totals(job.grad_accum)
    if job.trains:
        total.hbm_bytes += _update_bytes(job)
    if job.trains and job.remat == "offload":  # each layer's input out and in
        inputs = job.cfg.num_hidden_layers * job.tokens * job.cfg.hidden_size * job.compute_bytes
        total.host_bytes += 2.0 * inputs * job.grad_accum
    if job.program == "decode":
        total.hbm_bytes += _decoded_bytes(job)
    return total


def forwards(job: Job) -> float:
    """Passes through the weight products, a backward pass counting two."""
    return 3.0 + PASSES[job.remat] if job.trains else 1.0


def _products(job: Job, share: Share) -> float:
    """Passes of rows through one matrix: without its own gradient where it is frozen."""
    return forwards(job) - (job.trains and not share.trainable)


def _rereads(job: Job) -> float:
    """Passes that gather weights and read them: forward, and with the backward pass."""
    return 2.0 if job.trains else 1.0


def _weights(work: _Work, stack: Stack, kind: LayerKind, layers: int) -> None:
    """Products with the weights of one kind of layer, and the weights' own way."""
    job = work.job
    for share in job.of_layer(stack, kind):
        if not share.is_matrix:
            continue
        elements = share.used_elements * layers
        size = float(share.used_elements * job.compute_bytes)
        if ".experts." not in share.name:
            work.flops += 2.0 * job.tokens * elements * _products(job, share)
        if job.program == "decode":
            continue
        if share.gathered_over:
            work.send("all-gather", share.gathered_over, share.sent_bytes(job.compute_bytes), layers * _rereads(job))
        work.bytes += layers * size * (2 * _rereads(job) + job.trains)  # written when gathered, read by each product
        if not (job.trains and share.trainable):
            continue
        summed = [axis for axis in (*ACTIVATIONS["batch"], "context") if axis not in _cut_in_use(share)]
        scattered = tuple(axis for axis in share.gathered_over if axis in summed)
        work.send("reduce-scatter", scattered, size, layers)
        left = tuple(axis for axis in summed if axis not in scattered)
        work.send(
            "all-reduce", left, size / max(1, math.prod(job.devices(axis) for axis in share.gathered_over)), layers
        )
        work.bytes += layers * size * 2
    for what in (
        "o",
        "down",
    ):  # rows of these weights are cut over tensor, so that outputs and input gradients are sums
        hidden = float(job.tokens * job.cfg.hidden_size * job.compute_bytes)
        works = 2.0 + PASSES[job.remat] if job.trains else 1.0
        work.send(
            "all-reduce", ("tensor",), hidden, layers * works * (2 if what == "down" and job.cfg.num_experts else 1)
        )


def _cut_in_use(share) -> set[str]:
    return set(share.stored_over) - set(share.gathered_over)


def _attention(work: _Work, stack: Stack, kind: LayerKind, layers: int) -> None:
    job, cfg = work.job, work.job.cfg
    head, window = cfg.head_size(kind), cfg.window(kind)
    if job.program == "decode":
        seen = slots(cfg, kind, job.length) / (
            job.devices("context") if job.length % job.devices("context") == 0 else 1
        )
        work.flops += layers * 4.0 * job.local_rows * job.heads * head * seen
        return
    context = job.devices("context")
    block_q, block_kv = _blocks(kind, job.length)
    pairs = _visited(job.length, window, block_q, block_kv) * job.local_rows * job.heads / context
    if window is None and context > 1 and job.length < BALANCE_FROM:
        pairs *= 2 - 1 / context  # the last device does the most
    forward = 4.0 * pairs * head
    passes = (1 + (job.remat not in ATTENTION_KEPT) + ATTENTION_BACKWARD) if job.trains else 1.0
    work.flops += layers * forward * passes
    # Each block of queries reads the keys and values it visits again; dq as well, dk and dv the queries and cotangents.
    again = pairs / block_q * 2 * head * job.compute_bytes
    work.bytes += layers * again * ((1 + (job.remat not in ATTENTION_KEPT) + 2) if job.trains else 1.0)
    if context == 1:
        return
    kv = 2.0 * job.local_rows * job.kv_heads(kind) * head * job.compute_bytes  # of one token
    times = layers * (3.0 if job.trains else 1.0)
    if window is not None and window <= job.length - job.local_length:
        work.send("collective-permute", ("context",), kv * (-(-(window - 1) // 128) * 128), times)
        return
    work.send("all-gather", ("context",), kv * job.length, layers * _rereads(job))
    work.send("reduce-scatter", ("context",), kv * job.length, float(layers * job.trains))
    if window is None and job.length >= BALANCE_FROM:
        half = job.tokens * job.heads * head * job.compute_bytes / 2
        work.send("collective-permute", ("context",), half, 2 * times)


def _blocks(kind: LayerKind, length: int) -> tuple[int, int]:
    """Rows of queries and keys in a block of the forward kernel, as `kernels.splash.block_sizes` with bfloat16 chooses."""
    return min(512 if kind == "sliding" else 1024, length), min(512, length)


@functools.lru_cache(maxsize=256)
def _visited(length: int, window: int | None, block_q: int, block_kv: int) -> float:
    """Pairs of queries and keys of one causal sequence that lie in blocks the kernel visits."""
    first = np.arange(0, length, block_q)
    last = np.minimum(first + block_q, length) - 1
    lowest = np.zeros_like(first) if window is None else np.maximum(0, first - window + 1)
    return float((last // block_kv - lowest // block_kv + 1).sum()) * block_q * block_kv


def _activations(work: _Work, visits: Visits, stack: Stack, kind: LayerKind, layers: int) -> None:
    job, cfg = work.job, work.job.cfg
    each = (
        visits.residual * cfg.hidden_size
        + visits.queries * job.heads * cfg.head_size(kind)
        + visits.ffw * job.ffw(stack)
    )
    work.bytes += layers * each * job.tokens * job.compute_bytes * forwards(job)


def _experts(work: _Work, visits: Visits, layers: int) -> None:
    job, cfg, route = work.job, work.job.cfg, work.job.experts_route
    if not route:
        return
    inner = cfg.moe_intermediate_size / job.devices("tensor")
    rows = job.tokens * cfg.top_k_experts
    passes = forwards(job) - (job.lora is not None and not _adapted_experts(job))
    again = passes + (route != "whole" and job.trains)  # their inner product runs once more, see kernels.experts
    work.flops += layers * rows * 6.0 * cfg.hidden_size * inner * again
    work.bytes += (
        layers * rows * (visits.expert_rows * cfg.hidden_size + visits.ffw * inner) * job.compute_bytes * again
    )
    hidden = float(job.tokens * cfg.hidden_size * job.compute_bytes)
    ranks, axes = job.devices("expert"), ("expert",)
    forward = 1.0 + PASSES[job.remat] if job.trains else 1.0
    if route == "gather":
        work.send("all-gather", axes, hidden * ranks, layers * (forward + 2 * job.trains))
        work.send("reduce-scatter", axes, hidden * ranks, layers * (forward + job.trains))
    elif route == "exchange":
        size = hidden * cfg.top_k_experts * ROOM
        work.send("all-to-all", axes, size, layers * (2 * forward + 3 * job.trains))


def _adapted_experts(job: Job) -> list[Share]:
    """The weights of experts that adapters are added to."""
    return [share for share in job.shares if ".experts." in share.name and job.moves(_beside(share))]


def _sums(work: _Work) -> None:
    """A B for each matrix of experts that has an adapter, and two products as large for the gradients of A and of B."""
    job = work.job
    for share in _adapted_experts(job):
        assert job.lora is not None
        # Made where the weight rests, of codes where it is used.
        size = share.layers * share.used_elements if share.per_byte else share.elements
        work.flops += 2.0 * job.lora.rank * size * forwards(job)


def _beside(share: Share) -> str:
    """Name of the adapter's array that a weight with an adapter has."""
    return share.name.removesuffix(".w") + ".adapter.a"


def _vocabulary(work: _Work, visits: Visits) -> None:
    """Lookup, per-layer inputs, head and loss."""
    job, cfg = work.job, work.job.cfg
    width = cfg.hidden_size
    if job.per_layer_width:
        passes = 3 if any(job.moves(name) for name in PER_LAYER_INPUTS) else 1
        work.flops += 2.0 * job.tokens * width * job.per_layer_width * passes
        work.bytes += 6.0 * job.tokens * job.per_layer_width * job.compute_bytes * passes
    holders = job.devices(*VOCABULARY)
    rows = job.tokens * (width + job.per_layer_width) * job.compute_bytes
    if holders > 1:
        # Rows sent per token in `kernels.vocabulary`: 1.5 on 8 devices, 1.75 on 16, 2.5 on 64.
        sent = 0.75 + 0.25 * math.log2(holders)
        work.send("all-to-all", VOCABULARY, rows * sent * holders / (holders - 1), 1.0 + job.moves("embed.w"))
    if not job.trains:
        logits = 2.0 * job.local_rows * job.devices("fsdp", "expert") * job.vocabulary
        work.flops += logits * width
        work.bytes += job.vocabulary * width * job.compute_bytes
        work.send("all-to-all", VOCABULARY, 4.0 * job.local_rows * cfg.vocab_size)
        return
    copies = 2 if job.teacher else 1
    together = job.tokens * job.sharers  # tokens that a device multiplies by its rows
    learns = job.moves("embed.w")
    work.flops += 2.0 * together * job.vocabulary * width * (2 + learns + copies - 1)
    chunks = max(1.0, together / 2048)
    work.bytes += chunks * job.vocabulary * width * (8 * learns + 2 * copies * job.compute_bytes)
    work.bytes += visits.logits * copies * together * job.vocabulary * 4
    shared = ("fsdp", "expert", "context")
    hidden = float(together * width * job.compute_bytes)
    work.send("all-gather", shared, hidden, copies)
    work.send("reduce-scatter", shared, hidden)
    if job.teacher:
        _teacher(work)


def _teacher(work: _Work) -> None:
    """A forward pass of a second model of the same shape: a share of what the student's passes cost."""
    share = 1.0 / forwards(work.job)
    work.flops *= 1 + share
    work.bytes *= 1 + share
    for key, size in work.traffic.items():
        work.traffic[key] = size * (1 + (0.5 if key[0] == "all-gather" else share))


def _update_bytes(job: Job) -> float:
    """Gradients written, read for the norm and again; parameters and moments read and written."""
    at_rest = sum(
        share.elements * (share.itemsize or job.param_bytes) for share in job.shares
    )  # read before it is gathered
    moments = BYTES[job.first_moment] + 4
    trained = [share for share in job.shares if share.trainable]
    moved = sum(share.elements * (4 * 4 + 2 * (share.itemsize or job.param_bytes) + 2 * moments) for share in trained)
    return float(moved + 2 * at_rest * job.grad_accum)


def _decoded_bytes(job: Job) -> float:
    """A token of each row: all weights once, of experts those that are chosen at most, and all caches."""
    total = 0.0
    for share in job.shares:
        size = share.layers * share.used_elements * job.compute_bytes
        if ".experts." in share.name:
            size *= min(1.0, job.rows * job.cfg.top_k_experts / job.cfg.num_experts)
        if not share.is_table:
            total += size
    return total + cache_bytes(job.cfg, job.sizes, job.rows, job.length, job.compute_bytes)


def _to_next(sizes: tuple[int, ...], axes: tuple[str, ...]) -> np.ndarray:
    members = device_groups(sizes, axes)
    return np.concatenate([np.stack([row[:-1], row[1:]], axis=1) for row in members])

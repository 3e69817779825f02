"""Memory of one device without a compiler: arguments exactly, temporaries by counting what lives at the worst moment.

The constants say how many arrays of a kind live at once; they are calibrated against compiled programs.
"""

import dataclasses

from gemma4_jax.config import LayerKind, Stack
from gemma4_jax.kernels.cross_entropy import MESH_CHUNK, MESH_CHUNK_BYTES, default_chunk
from gemma4_jax.kernels.expert_routes import ROOM, largest_block
from gemma4_jax.kernels.vocabulary import PART_BYTES
from gemma4_jax.plan.job import BYTES, Job
from gemma4_jax.plan.shares import cache_bytes, gathered_bytes, moment_bytes, resting_bytes, tiled_bytes


@dataclasses.dataclass(frozen=True)
class Constants:
    """Arrays that live at once, by shape. [M, x] is one activation per token of the device in the compute dtype."""

    gathered: float = 1.2  # one layer's weights in use: this layer's, and the next layer's on the way
    residual: float = 8.0  # [M, D] in the backward pass of a layer: norms in and out, cotangents, float32 partly
    queries: float = 7.0  # [M, N H]: q, output, heads-first copies, their cotangents
    keys: float = 7.0  # [S, K H], k and v each a half
    ffw: float = 4.5  # [M, F]: gate, up, their cotangents
    deferred: float = 3.5  # [M, F] of a full layer with shared keys and values: its gradients wait for the next layers'
    expert_rows: float = 3.0  # [R, D], R rows sorted by expert
    expert_ffw: float = 5.0  # [R, F]
    hidden_copies: float = 3.0  # [M, D] around the loss: hidden states, sorted, their gradient
    logits: float = 3.0  # float32 chunks
    exchange: float = 6.0  # parts of the vocabulary's exchange, backwards
    forward: float = 0.33  # share of a layer's backward work that a forward pass needs
    cache_copies: float = 1.0  # of a cache that a prefill fills, beside itself


CONSTANTS = Constants()

SAVED = {
    "none": ("residual", "queries", "keys", "ffw"),
    "full": (),
    "offload": (),
    "save_attention": ("queries",),
    "save_projections": ("queries", "keys", "ffw"),
}
"""remat policy -> what it keeps of each layer beside the layer's input."""

PER_LAYER_INPUTS = ("per_layer.table.w", "per_layer.projection.w", "per_layer.projection.adapter.a")
"""What a gradient of the per-layer inputs is made for."""


def footprint(job: Job, constants: Constants = CONSTANTS) -> dict[str, float]:
    """Bytes by name: arguments, then the temporaries of the worst moment. Their sum is the compiler's peak."""
    parts = _arguments(job)
    if job.whole is not None:
        parts["towers"] = tower_bytes(job)
    moments = _training(job, constants) if job.trains else _inference(job, constants)
    return parts | max(moments, key=lambda moment: sum(moment.values()))


def tower_bytes(job: Job) -> float:
    """Towers and projectors at rest, and the teacher's: frozen, so nothing lies beside them. Not what they make of pictures."""
    if job.whole is None:
        return 0.0
    whole, sizes = job.whole, job.sizes
    kept = [job.param_bytes, *([job.compute_bytes] if job.teacher else [])]
    return sum(resting_bytes(whole, sizes, itemsize) - resting_bytes(job.cfg, sizes, itemsize) for itemsize in kept)


def _arguments(job: Job) -> dict[str, float]:
    def resting(itemsize: int, trained: bool | None = None) -> float:
        return resting_bytes(job.cfg, job.sizes, itemsize, trained, job.lora)

    def beside(itemsize: int) -> float:
        return moment_bytes(job.cfg, job.sizes, itemsize, job.lora)

    if job.program == "decode":  # nothing is gathered for one token
        parts = {"parameters": float(sum(s.layers * tiled_bytes(s.used, job.param_bytes) for s in job.shares))}
        parts["caches"] = cache_bytes(job.cfg, job.sizes, job.rows, job.length, job.compute_bytes)
        return parts
    if job.lora is None:
        parts = {"parameters": resting(job.param_bytes)}
    else:
        parts = {"base": resting(job.param_bytes, False), "adapters": resting(4, True)}
    if job.trains:
        parts["optimizer"] = beside(BYTES[job.first_moment]) + beside(4)
        if job.teacher:
            parts["teacher"] = resting(job.compute_bytes)
    else:
        parts["caches"] = cache_bytes(job.cfg, job.sizes, job.rows, job.length, job.compute_bytes)
    parts["batch"] = float((5 if job.trains else 2) * 4 * job.tokens * job.grad_accum)
    return parts


def _training(job: Job, c: Constants) -> list[dict[str, float]]:
    """The moments that can be worst: the loss, the backward pass of each kind of layer, and that of the lookup."""
    hidden = job.tokens * job.cfg.hidden_size * job.compute_bytes
    table = job.vocabulary * job.cfg.hidden_size
    kept = {"layer inputs": 0.0 if job.remat == "offload" else float(job.cfg.num_hidden_layers * hidden)}
    kept["saved of layers"] = float(sum(n * _saved(job, c, stack, kind) for stack, kind, n in job.layer_kinds))
    if job.per_layer_width:
        copies = 1.0 + any(job.moves(name) for name in PER_LAYER_INPUTS)  # with its gradient
        kept["per-layer inputs"] = copies * job.tokens * job.per_layer_width * job.compute_bytes
    if job.cfg.num_kv_shared_layers:
        kept["shared keys and values"] = 2.0 * sum(_keys(job, kind) for kind in ("sliding", "full"))
    # The table's gradient is made with the loss. With gradient accumulation the layers' gradients are there throughout, once
    # (`model.tally`); tables have a sum beside the gradient of a micro-batch.
    of_layers = {True: 0.0, False: 0.0}
    for share in job.shares:
        of_layers[share.is_table] += 4.0 * share.elements * share.trainable
    summed = {"summed gradients": of_layers[True]} if job.grad_accum > 1 else {}
    table_gradient = 4.0 * table * job.moves("embed.w")
    moments = [
        {**summed, **kept, "gradients": table_gradient + of_layers[False] * (job.grad_accum > 1), **_loss(job, c)},
        {**summed, "gradients": of_layers[True] + of_layers[False] + table_gradient, **_lookup(job, c)},
    ]
    for stack, kind, _ in job.layer_kinds:
        work = {"gathered weights": c.gathered * _gathered(job, stack, kind), "layer work": _work(job, c, stack, kind)}
        later = {"gradients": of_layers[False] + table_gradient}
        moments.append({**summed, **kept, **later, **work})
    return moments


def _inference(job: Job, c: Constants) -> list[dict[str, float]]:
    if job.program == "decode":
        logits = 4.0 * job.local_rows * job.cfg.vocab_size
        biggest = max(_work(job, c, stack, kind) for stack, kind, _ in job.layer_kinds)
        return [{"logits": 3 * logits, "layer work": c.forward * biggest}]
    caches = cache_bytes(job.cfg, job.sizes, job.rows, job.length, job.compute_bytes)
    hidden = float(job.tokens * job.cfg.hidden_size * job.compute_bytes)
    moments = []
    for stack, kind, _ in job.layer_kinds:
        work = {
            "hidden states": c.hidden_copies * hidden,
            "gathered weights": (c.gathered - 1) * _gathered(job, stack, kind),  # no gradient
            "layer work": c.forward * _work(job, c, stack, kind),
            "caches while they are filled": c.cache_copies * caches,
        }
        if job.per_layer_width:
            work["per-layer inputs"] = float(job.tokens * job.per_layer_width * job.compute_bytes)
        moments.append(work)
    return moments


def _gathered(job: Job, stack: Stack, kind: LayerKind) -> float:
    return gathered_bytes(job.cfg, job.sizes, f"{stack.name}.{kind}", job.compute_bytes, job.lora)


def _keys(job: Job, kind: LayerKind) -> float:
    """k and v of a device's own tokens."""
    return 2.0 * job.tokens * job.kv_heads(kind) * job.cfg.head_size(kind) * job.compute_bytes


def _seen_keys(job: Job, kind: LayerKind) -> float:
    """k and v that its queries read: the whole sequence's on full layers, a halo more on sliding ones."""
    return _keys(job, kind) * (job.devices("context") if kind == "full" and job.program != "decode" else 1)


def _queries(job: Job, kind: LayerKind) -> float:
    return float(job.tokens * job.heads * job.cfg.head_size(kind) * job.compute_bytes)


def _work(job: Job, c: Constants, stack: Stack, kind: LayerKind) -> float:
    """Activations of one layer while it is differentiated."""
    dense = c.residual * job.tokens * job.cfg.hidden_size * job.compute_bytes
    attention = c.queries * _queries(job, kind) + c.keys * _seen_keys(job, kind) / 2
    ffw = (c.ffw + c.deferred * (job.trains and not stack.owns_kv)) * job.tokens * job.ffw(stack) * job.compute_bytes
    return dense + max(attention, ffw) + _experts(job, c)


def _experts(job: Job, c: Constants) -> float:
    cfg, route = job.cfg, job.experts_route
    if not route:
        return 0.0
    rows = job.tokens * cfg.top_k_experts * (ROOM if route != "whole" else 1.0)
    if route == "gather":
        rows = min(rows, largest_block(cfg.num_experts // job.devices("expert")))
    inner = cfg.moe_intermediate_size / job.devices("tensor")
    size = rows * (c.expert_rows * cfg.hidden_size + c.expert_ffw * inner) * job.compute_bytes
    if route == "gather":  # the tokens of all, and the sums made for them
        size += 3.0 * job.devices("expert") * job.tokens * cfg.hidden_size * job.compute_bytes
    return size


def _saved(job: Job, c: Constants, stack: Stack, kind: LayerKind) -> float:
    """What a remat policy keeps of one layer, without its input."""
    if job.remat not in SAVED:
        raise ValueError(f"remat is one of {', '.join(SAVED)}, got {job.remat!r}")
    of = {
        "residual": c.residual * job.tokens * job.cfg.hidden_size * job.compute_bytes,
        "queries": (3 if job.remat == "none" else 1) * _queries(job, kind),
        "keys": _keys(job, kind) * stack.owns_kv,
        "ffw": (2 if job.remat == "save_projections" else 3) * job.tokens * job.ffw(stack) * job.compute_bytes,
    }
    return float(sum(of[name] for name in SAVED[job.remat]))


def _loss(job: Job, c: Constants) -> dict[str, float]:
    hidden = float(job.tokens * job.cfg.hidden_size * job.compute_bytes)
    copies = 2 if job.teacher else 1
    if job.devices() == 1:
        chunk = min(job.tokens, default_chunk(job.cfg.vocab_size))
    else:
        local = 4 * job.vocabulary
        chunk = max(default_chunk(job.cfg.vocab_size), min(MESH_CHUNK, MESH_CHUNK_BYTES // local))
        chunk = min(chunk, job.tokens * job.sharers)
    logits = 4.0 * chunk * job.vocabulary
    return {
        "hidden states at the loss": c.hidden_copies * copies * hidden,
        "logits": (c.logits + copies - 1) * logits,
        "table at the loss": float(copies * job.vocabulary * job.cfg.hidden_size * job.compute_bytes),
    }


def _lookup(job: Job, c: Constants) -> dict[str, float]:
    row = job.cfg.hidden_size + job.per_layer_width
    part = min(PART_BYTES, job.tokens * max(job.cfg.hidden_size, job.per_layer_width) * job.compute_bytes)
    return {
        "hidden states at the lookup": float(job.tokens * row * job.compute_bytes),
        "exchange of rows": c.exchange * part if job.devices() > 1 else 0.0,
    }

"""FLOPs and HBM bytes of custom calls, which XLA cannot see into: Pallas kernels, cuBLAS and cuDNN."""

import dataclasses
import math
import re
from collections.abc import Callable

from gemma4_jax.model.attend import BALANCE_FROM
from gemma4_jax.plan.hlo import HBM, Computation, Instruction


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Of one call. `bytes` None: its operands and results, each once."""

    flops: float
    bytes: float | None = None


Price = Callable[[Computation, Instruction], KernelCost | None]
"""What a caller may pass to price kernels of its own; None: not mine."""

PLUMBING = {
    "AllocateBuffer",
    "AnnotateDeviceBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "MoveToDevice",
    "MoveToHost",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}
"""Targets that move nothing and compute nothing."""

WITHOUT_PRODUCTS = ("TopK", "Sort", "GatherScatterIndices", "__cub$", "annotate_device_placement")
"""Beginnings of targets that multiply no matrices."""


def target(instruction: Instruction) -> str:
    """The custom call's target."""
    return instruction.attribute("custom_call_target")


def kernel_name(instruction: Instruction) -> str:
    """What the kernel calls itself, which is how XLA names the instruction.

    A kernel without a name of its own is called after the functions around it, `transpose_jvp_jit_tgmm___`: then the innermost of
    the scopes around its pallas_call, tgmm. Other custom calls go by their target.
    """
    path = instruction.op_name.split("/")
    if "pallas_call" not in path[-1]:
        return target(instruction)
    name = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction.name)
    if not re.match(r"(transpose|jvp|vmap|jit|custom-call|pallas_call|checkpoint|shard_map|closed_call)(_|\b)", name):
        return name
    scopes = [re.findall(r"[^()]+", part)[-1] for part in path[:-1] if part.strip("()")]
    return scopes[-1] if scopes else name


def price(computation: Computation, call: Instruction, price_more: Price | None = None) -> KernelCost | None:
    """The cost of one custom call: the caller's rule, else one of ours, else the kernel's own estimate, else None."""
    if price_more is not None:
        found = price_more(computation, call)
        if found is not None:
            return found
    name, to = kernel_name(call), target(call)
    if name.startswith("splash_"):
        found = splash(computation, call, name)
        if found is not None:
            return found
    if to.startswith(WITHOUT_PRODUCTS):
        return KernelCost(0.0)
    if to.startswith("__cublas$"):
        return KernelCost(_gemm(computation, call))
    if to.startswith("__cudnn$fmha"):
        return KernelCost(_cudnn_attention(computation, call, to))
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', call.attributes)
    if estimate:
        numbers = {key: float(value) for key, value in re.findall(r'"(\w+)":"?(\d+)"?', estimate[1])}
        return KernelCost(numbers.get("flops", 0.0), numbers.get("bytes_accessed"))
    return None


_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of [queries, keys, head] that a splash kernel does a block: q k, p v; q k, do v, ds k; and so on."""


def splash(computation: Computation, call: Instruction, name: str) -> KernelCost | None:
    """`jax.experimental.pallas.ops.tpu.splash_attention`: the blocks that its grid visits.

    Operands are the mask's block tables [1 or N, query blocks, key blocks visited] (dkv: [.., query blocks visited, key
    blocks]), then q [.., N, T, H], k and v. Tables shrunk to a sliding window are visited whole. Others are taken for causal:
    with T = S up to the diagonal; with T < S, a share of the queries, half of them if queries are dealt out evenly (as
    `model.attend` does with long sequences), else all, as on the last device. Keys and values are read again for each
    block of queries.
    """
    shapes = computation.operand_shapes(call)
    tables = [each for each in shapes if each.dtype.startswith(("s", "u")) and len(each.dims) >= 3]
    arrays = [each for each in shapes if each.dtype.startswith(("bf", "f")) and len(each.dims) >= 2]
    kind = next((kind for kind in _MATMULS if f"_{kind}" in name), None)
    if kind is None or not tables or len(arrays) < 3:
        return None
    q, k, v = arrays[:3]
    suffix = "" if kind == "fwd" else f"_{kind}"
    block_q, block_kv = (_metadata(call, f"block_{side}{suffix}") for side in ("q", "kv"))
    if not block_q or not block_kv:
        return None
    queries, keys, heads = q.dims[-2], k.dims[-2], math.prod(q.dims[:-2])
    rows, columns = tables[0].dims[-2:]
    if queries == keys and rows * block_q >= queries and columns * block_kv >= keys:
        visited = sum(min(columns, -(-(row + 1) * block_q // block_kv)) for row in range(rows))
    else:
        dealt_out = queries < keys and keys >= BALANCE_FROM and columns * block_kv >= keys
        visited = rows * columns / (2 if dealt_out else 1)
    fused = kind == "dkv" and sum(each.dims[-2:] == q.dims[-2:] for each in call.leaves) > 2  # dq, dk and dv together
    flops = 2.0 * (_MATMULS[kind] + fused) * heads * visited * block_q * block_kv * (k.dims[-1] + v.dims[-1]) / 2
    # Of queries, dkv also reads do and the two statistics of the softmax, which have a value or eight for each query and head.
    again = [each for each in arrays if each.size % (heads * queries) == 0] if kind == "dkv" else [k, v]
    again = [each for each in again if kind != "dkv" or (each is not k and each is not v)]
    rows_read, tokens = (block_q, heads * queries) if kind == "dkv" else (block_kv, math.prod(k.dims[:-1]))
    repeated = sum(heads * visited * rows_read * each.bytes / tokens for each in again if each.space == HBM)
    once = sum(each.bytes for each in [*shapes, *call.leaves] if each.space == HBM and each not in again)
    return KernelCost(flops, once + repeated)


def _metadata(call: Instruction, key: str) -> int:
    found = re.search(rf'\\?"{key}\\?":\s*(\d+)', call.attributes)
    return int(found[1]) if found else 0


def _gemm(computation: Computation, call: Instruction) -> float:
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    lhs = computation.operand_shapes(call)[0]
    dims = [int(number) for number in re.findall(r"\d+", contracted[1])] if contracted else [len(lhs.dims) - 1]
    return 2.0 * call.leaves[0].size * math.prod(lhs.dims[dim] for dim in dims)


def _cudnn_attention(computation: Computation, call: Instruction, to: str) -> float:
    """4 * B * N * T * S * H forwards and 2.5 times that backwards, half of it under a causal mask."""
    scores = re.search(r'"intermediate_tensor_shape":\{[^}]*"dimensions":\[([^\]]*)\]', call.attributes)
    head = computation.operand_shapes(call)[0].dims[-1]
    size = math.prod(int(number) for number in re.findall(r"\d+", scores[1])) if scores else 0
    return 4.0 * size * head * (2.5 if "Backward" in to else 1.0) * (0.5 if "CAUSAL" in call.attributes else 1.0)

"""What one run of a compiled program does on each device: FLOPs, HBM bytes, and bytes on the network by mesh axis.

Loops are multiplied out, of a conditional's branches the dearest counts. XLA's own `cost_analysis` counts a loop's body
once and Pallas kernels as nothing.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from gemma4_jax.plan.hlo import Computation, Instruction, Module, Shape, axes_of, called, groups
from gemma4_jax.plan.kernels import PLUMBING, Price, kernel_name, price, target
from gemma4_jax.plan.loops import Known, body_arguments, trip_count
from gemma4_jax.plan.traffic import result_shapes, traffic

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `bytes`: what a device ends up with (all-gather) or puts in (the others), per call."""

    kind: str
    axes: tuple[str, ...]
    members: int
    bytes: float
    calls: float
    name: str
    op_name: str
    shape: str
    groups: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, all calls together, by the ring algorithms; a permute sends all it has."""
        share = (self.members - 1) / self.members
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.calls * self.bytes * factor


@dataclasses.dataclass
class Kernel:
    """All calls of one kernel; `flops` None: nobody knows."""

    calls: float = 0.0
    flops: float | None = 0.0
    bytes: float = 0.0


@dataclasses.dataclass
class Totals:
    """Of one run, per device."""

    matmul_flops: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    loops: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    @property
    def kernel_flops(self) -> float:
        """FLOPs of kernels whose cost is known."""
        return sum(each.flops or 0.0 for each in self.kernels.values())

    @property
    def flops(self) -> float:
        """All FLOPs of matmuls, in XLA's instructions and in kernels."""
        return sum(self.matmul_flops.values()) + self.kernel_flops

    @property
    def wire_bytes(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(kind, mesh axes) -> bytes a device sends."""
        found: dict[tuple[str, tuple[str, ...]], float] = {}
        for each in self.collectives:
            key = each.kind, each.axes
            found[key] = found.get(key, 0.0) + each.wire_bytes
        return found

    def add(self, other: "Totals", times: float = 1.0) -> None:
        """Count `other` in, `times` over."""
        for key, value in other.matmul_flops.items():
            self.matmul_flops[key] += times * value
        self.hbm_bytes += times * other.hbm_bytes
        self.host_bytes += times * other.host_bytes
        self.collectives += [dataclasses.replace(each, calls=times * each.calls) for each in other.collectives]
        for name, kernel in other.kernels.items():
            mine = self.kernels.setdefault(name, Kernel())
            mine.calls += times * kernel.calls
            mine.flops = None if mine.flops is None or kernel.flops is None else mine.flops + times * kernel.flops
            mine.bytes += times * kernel.bytes
        self.loops.update(other.loops)
        self.unknown_loops += other.unknown_loops


def totals(
    module: Module,
    mesh: Mapping[str, int],
    *,
    price_kernel: Price | None = None,
    trips: Mapping[str, int] | None = None,
) -> Totals:
    """Costs of one run of `module`.

    Args:
      module: a parsed program.
      mesh: axis -> size in mesh order; the devices that the program was compiled for, in that order.
      price_kernel: costs of custom calls that `kernels.price` does not know, or that it knows wrongly.
      trips: how often a loop runs whose end depends on data, by a named scope that it stands in; the innermost counts.
        Loops in none of them run once and are listed in `unknown_loops`.
    """
    return _Reader(module, dict(mesh), price_kernel, trips or {}).computation(module.entry, {})


@dataclasses.dataclass
class _Reader:
    module: Module
    mesh: dict[str, int]
    price_kernel: Price | None
    trips: Mapping[str, int]

    def computation(self, computation: Computation, known: Known) -> Totals:
        total = Totals()
        chains: set[str] = set()  # collectives already counted, see _chain
        for each in computation.instructions:
            moved, host = traffic(self.module, computation, each)
            if each.opcode == "custom-call":
                moved = self._custom_call(computation, each, moved, total)
            total.hbm_bytes += moved
            total.host_bytes += host
            if each.opcode == "while":
                self._loop(computation, each, known, total)
            elif each.opcode == "conditional":
                branches = [self.computation(self.module.computations[name], {}) for name in called(each)]
                total.add(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes)))
            elif called(each):
                for name in called(each):
                    total.add(self.computation(self.module.computations[name], {}))
            else:
                self._arithmetic(computation, each, total, chains)
        return total

    def _loop(self, computation: Computation, loop: Instruction, known: Known, total: Totals) -> None:
        trips = trip_count(self.module, computation, loop, known)
        if trips is None:
            trips = self._told(loop)
        if trips is None:
            total.unknown_loops.append(loop.op_name or loop.name)
            trips = 1
        else:
            total.loops[loop.name] = trips
        inside = body_arguments(self.module, computation, loop, known)
        for name in called(loop):
            total.add(self.computation(self.module.computations[name], inside), trips)

    def _told(self, loop: Instruction) -> int | None:
        """What the caller said of the innermost scope, as in jit(step)/jvp(loss)/while."""
        for scope in reversed(re.findall(r"[^/()]+", loop.op_name)):
            if scope in self.trips:
                return self.trips[scope]
        return None

    def _custom_call(self, computation: Computation, call: Instruction, moved: float, total: Totals) -> float:
        if target(call) in PLUMBING:
            return 0.0
        cost = price(computation, call, self.price_kernel)
        flops = None if cost is None else cost.flops
        moved = moved if cost is None or cost.bytes is None else cost.bytes
        total.add(Totals(kernels={kernel_name(call): Kernel(1.0, flops, moved)}))
        return moved

    def _arithmetic(self, computation: Computation, made: Instruction, total: Totals, chains: set[str]) -> None:
        """Count matmuls and collectives of an instruction, and of all inside it if it is a fusion."""
        kind = made.opcode.removesuffix("-start")
        if made.opcode == "fusion":
            inner = self.module.computations[made.computations("calls")[0]]
            for each in inner.instructions:
                self._arithmetic(inner, each, total, chains)
        elif kind in ("dot", "convolution", "ragged-dot"):
            flops = {"dot": dot_flops, "convolution": convolution_flops, "ragged-dot": ragged_dot_flops}[kind]
            total.matmul_flops[_rate(computation, made)] += flops(computation, made)
        elif kind in COLLECTIVES:
            chain = self._chain(made)
            if chain:
                if chain in chains:
                    return
                chains.add(chain)
                total.hbm_bytes += sum(each.bytes for each in computation.operand_shapes(made) + made.leaves)
            found = self._collective(computation, made, kind)
            if found.members > 1:
                total.collectives.append(found)

    def _chain(self, made: Instruction) -> str:
        """The TPU spreads an asynchronous collective over a row of fusions, each of which repeats the instruction."""
        chain = made.attribute("frontend_attributes")
        return f"{made.attribute('channel_id')} {chain}" if "chain_id=" in chain else ""

    def _collective(self, computation: Computation, made: Instruction, kind: str) -> Collective:
        members = groups(made, math.prod(self.mesh.values()))
        reads = computation.operand_shapes(made)
        arrays = result_shapes(computation, made) if kind == "all-gather" else reads
        if kind == "ragged-all-to-all":
            arrays = reads[:1]  # data; then room for the result, offsets and sizes
        if kind == "all-reduce" and "from-cross-replica-sharding" in made.attribute("frontend_attributes"):
            kind = "reduce-scatter"  # a TPU's, which keeps its share of the sum in the same fusion
        return Collective(
            kind=kind,
            axes=axes_of(members, self.mesh),
            members=members.shape[1],
            bytes=float(sum(each.bytes for each in arrays)),
            calls=1.0,
            name=made.name,
            op_name=made.op_name,
            shape=", ".join(str(each) for each in arrays),
            groups=members,
        )


def _rate(computation: Computation, dot: Instruction) -> str:
    """The rate class of a matmul: the wider operand's dtype, and how exact float32 has to be."""
    widest = max((computation.by_name[name].leaves[0] for name in dot.operands[:2]), key=lambda shape: shape.bits)
    precision = dot.attribute("operand_precision").strip("{}").split(",")[0]
    return widest.dtype if precision in ("", "default") else f"{widest.dtype} {precision}"


def dot_flops(computation: Computation, dot: Instruction) -> float:
    """2 * result elements * contracted elements."""
    lhs = computation.by_name[dot.operands[0]].leaves[0]
    return 2.0 * dot.leaves[0].size * math.prod(lhs.dims[dim] for dim in dot.integers("lhs_contracting_dims"))


def ragged_dot_flops(computation: Computation, dot: Instruction) -> float:
    """As a dot whose every row meets one group: rows in several groups' result are counted once."""
    lhs = computation.by_name[dot.operands[0]].leaves[0]
    flops = dot_flops(computation, dot)
    ragged = dot.integers("lhs_ragged_dims")
    contracted = dot.integers("lhs_contracting_dims")
    if ragged and ragged[0] in contracted:  # [M, K], [M, N] -> [G, K, N]
        return flops / dot.leaves[0].dims[0]
    return flops if contracted else 2.0 * dot.leaves[0].size * lhs.dims[-1]


def convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """2 per product that meets a real input element; a TPU writes every dot as a convolution, batch dims as windows."""
    lhs, rhs = (computation.by_name[name].leaves[0] for name in convolution.operands[:2])
    out = convolution.leaves[0]
    left, kernel, result = _labels(convolution.attribute("dim_labels"))
    window = _window(convolution.attribute("window"))
    products = 1
    for index in range(len(left) - 2):
        label = str(index)
        products *= _valid(
            _dim(lhs, left, label),
            _dim(rhs, kernel, label),
            _dim(out, result, label),
            *(each[index] for each in window),
        )
    features = _dim(rhs, kernel, "i")  # input features of one group
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    return 2.0 * products * features * _dim(out, result, "f") * _dim(lhs, left, "b") / batch_groups


def _labels(text: str) -> tuple[str, str, str]:
    """dim_labels of the three arrays: 0bf_0io->0bf."""
    inputs, result = text.split("->")
    left, kernel = inputs.split("_")
    return left, kernel, result


def _dim(shape: Shape, labels: str, label: str) -> int:
    return shape.dims[labels.index(label)]


class _Default(list):
    def __init__(self, items: list, default):
        super().__init__(items)
        self.default = default

    def __getitem__(self, index):
        return super().__getitem__(index) if index < len(self) else self.default


def _window(text: str) -> tuple[_Default, ...]:
    """(stride, low padding, input dilation, kernel dilation) by spatial dim of window={size=8x1 pad=7_0x0_0 ..}."""
    parts = dict(part.split("=") for part in text.strip("{}").split())
    low = [int(each.split("_")[0]) for each in parts.get("pad", "").split("x") if each]

    def numbers(key: str) -> list[int]:
        return [int(each) for each in parts.get(key, "").split("x") if each]

    return (
        _Default(numbers("stride"), 1),
        _Default(low, 0),
        _Default(numbers("lhs_dilate"), 1),
        _Default(numbers("rhs_dilate"), 1),
    )


def _valid(size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs (result position, kernel position) that read an input element and not padding or a hole of dilation."""
    if kernel == 1 and low == 0 and dilation == 1:
        return out
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - low
    return int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())

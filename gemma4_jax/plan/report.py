"""What a plan prints: tables of memory, work, network and kernels of one device, and the roofline."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from gemma4_jax.chips import Chip, GiB, Topology
from gemma4_jax.config import KINDS
from gemma4_jax.kernels.choice import KERNELS, kernel_choice
from gemma4_jax.model.attend import share
from gemma4_jax.model.kv import slots
from gemma4_jax.model.parameters import variables
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.plan.costs import Totals
from gemma4_jax.plan.estimate import Estimate
from gemma4_jax.plan.job import Job
from gemma4_jax.plan.roofline import Roofline
from gemma4_jax.sharding import axes_in, size_of, stored_spec, use_spec
from gemma4_jax.tables import percent, table


def gib(size: float) -> str:
    """`12.34`."""
    return f"{size / GiB:,.2f}"


def milliseconds(seconds: float) -> str:
    """`12.34`."""
    return f"{1e3 * seconds:,.2f}"


def teraflops(flops: float) -> str:
    """`12.34`."""
    return f"{flops / 1e12:,.2f}"


def memory(parts: Mapping[str, float], chip: Chip, device: str = "device") -> str:
    """GiB of each part, their sum, and what is left of what a program may take."""
    total = sum(parts.values())
    room = chip.device_usable_hbm - total
    rows = [(name, gib(size), percent(size / chip.device_usable_hbm)) for name, size in parts.items() if size]
    rows.append(("total", gib(total), percent(total / chip.device_usable_hbm)))
    rows.append(("HBM a program may take", gib(chip.device_usable_hbm), "100.0 %"))
    rows.append(
        ("head-room" if room >= 0 else "too much by", gib(abs(room)), percent(abs(room) / chip.device_usable_hbm))
    )
    return table((f"memory of a {device}", "GiB", "of HBM"), rows)


def collectives(totals: Totals, result: Roofline) -> str:
    """Bytes a device sends, by kind and mesh axes, and the seconds of each group of axes."""
    calls: dict[tuple[str, tuple[str, ...]], float] = {}
    for each in totals.collectives:
        key = each.kind, each.axes
        calls[key] = calls.get(key, 0.0) + each.calls
    ordered = sorted(totals.wire_bytes.items(), key=lambda item: -item[1])
    rows = [(kind, along(axes), f"{calls[kind, axes]:,.0f}", gib(size)) for (kind, axes), size in ordered]
    shown = table(("collective", "mesh axes", "calls", "GiB sent"), rows) if rows else "no collectives"
    if len(result.network_by_axes) > 1:
        slowest = sorted(result.network_by_axes.items(), key=lambda item: -item[1])
        shown += "\n\n" + table(("mesh axes", "network ms"), [(along(axes), milliseconds(t)) for axes, t in slowest])
    return shown


def along(axes: tuple[str, ...]) -> str:
    """`fsdp x tensor`."""
    return " x ".join(axes) or "-"


def kernels(totals: Totals) -> str:
    """Calls and FLOPs of each custom call; `-` where nobody knows."""
    rows = [
        (name, f"{each.calls:,.0f}", None if each.flops is None else teraflops(each.flops), gib(each.bytes))
        for name, each in sorted(totals.kernels.items(), key=lambda item: -(item[1].flops or 0.0))
    ]
    return table(("kernel", "calls", "TFLOP", "GiB moved"), rows) if rows else "no kernels"


def work(totals: Totals, result: Roofline) -> str:
    """FLOPs and bytes of one step on one device."""
    rows = [
        ("model TFLOP", teraflops(result.model_flops)),
        ("executed TFLOP", teraflops(totals.flops)),
        ("  of these in kernels", teraflops(totals.kernel_flops)),
        (
            "model / executed",
            f"{result.model_flops / totals.flops:.3f}" if result.model_flops <= 1.05 * totals.flops else None,
        ),
        ("HBM GiB", gib(totals.hbm_bytes)),
        ("host GiB", gib(totals.host_bytes)),
        ("network GiB sent", gib(sum(totals.wire_bytes.values()))),
    ]
    shown = table(("work of a device and step", "amount"), rows)
    if totals.unknown_loops:
        shown += f"\n{len(totals.unknown_loops)} loops end by data and count as one run each (the exchange of embedding rows)"
    return shown


def roofline(result: Roofline, topology: Topology) -> str:
    """Seconds against published peaks, the binding one, and the bound on model FLOPs utilisation."""
    chip = topology.chip
    peaks = {
        "compute": f"{teraflops(chip.device_flops)} TFLOP/s bfloat16",
        "memory": f"{chip.device_hbm_bandwidth / 1e9:,.0f} GB/s HBM",
        "network": f"{chip.link_bandwidth / 1e9:,.0f} GB/s a link and direction, {chip.dcn_bandwidth / 1e9:,.1f} between pods",
        "host": f"{chip.device_host_bandwidth / 1e9:,.0f} GB/s to the host",
    }
    if not chip.torus_dims:
        peaks["network"] = (
            f"{chip.link_bandwidth / 1e9:,.0f} GB/s NVLink, {chip.dcn_bandwidth / 1e9:,.0f} between hosts"
        )
    rows = [
        (name, milliseconds(time), "<- binding" if name == result.binding else "", peaks[name])
        for name, time in result.times.items()
    ]
    return (
        table(("roofline", "ms", "", "peak (sources: gemma4_jax/chips.py)"), rows)
        + f"\n\nMFU at most {percent(result.mfu_bound)} ({milliseconds(result.step_seconds)} ms a step, all overlapped), "
        f"{percent(result.mfu_serial)} ({milliseconds(result.serial_seconds)} ms) with nothing overlapped"
    )


def compiled(parts: Mapping[str, float], totals: Totals, result: Roofline, topology: Topology) -> str:
    """All tables of a compiled program."""
    return "\n\n".join(
        (
            memory(parts, topology.chip, f"{topology.chip.name} device"),
            work(totals, result),
            collectives(totals, result),
            kernels(totals),
            roofline(result, topology),
        )
    )


def attention(job: Job, platform: str) -> str:
    """The kernel that computes each kind of layer's attention on one device, from the table in `kernels/choice.py`."""
    aligned, costs = job.program != "decode", {row.name: row.cost for row in KERNELS}
    rows = []
    for kind in KINDS:
        window, head = job.cfg.window(kind), job.cfg.head_size(kind)
        keys = job.length if aligned else slots(job.cfg, kind, job.length)
        queries = job.length if aligned else 1
        shape = share(queries, keys, head, window, aligned=aligned, context=job.devices("context"))
        name = kernel_choice(platform, shape)
        rows.append((kind, str(head), f"{shape.length:,} x {shape.keys:,}", name, costs[name]))
    return table(("attention", "head dim", "queries x keys", "kernel", "how"), rows)


def parameters(model: Transformer, mesh: Mesh | AbstractMesh) -> str:
    """Every parameter of a model (arrays or shapes): how it is cut at rest and in use, and its bytes on a device at rest."""
    rows, total = [], 0
    for name, variable in variables(model).items():
        shape, dims = variable.shape, variable.dims
        resting = stored_spec(mesh, dims, shape)
        cut = size_of(mesh, [axis for entry in resting for axis in axes_in(entry)])
        size = math.prod(shape) * variable.dtype.itemsize // cut
        total += size
        cuts = (_cut(dims, resting), _cut(dims, use_spec(mesh, dims, shape)))
        rows.append((name, " x ".join(map(str, shape)) or "scalar", *cuts, f"{size / 2**20:,.2f}"))
    rows.append(("all", "", "", "", f"{total / 2**20:,.2f}"))
    return table(("parameter", "shape", "at rest", "in use", "MiB a device"), rows)


def _cut(dims: Sequence[str], spec: PartitionSpec) -> str:
    """`embed over fsdp, q_heads over tensor`; `whole`."""
    named = [f"{name} over {' '.join(axes_in(entry))}" for name, entry in zip(dims, spec, strict=True) if entry]
    return ", ".join(named) or "whole"


def estimated(found: Estimate, topology: Topology) -> str:
    """All tables of an estimate."""
    shown = memory(found.memory, topology.chip, f"{topology.chip.name} device, estimated")
    axes = sorted(found.roofline.network_by_axes.items(), key=lambda item: -item[1])
    if axes:
        shown += "\n\n" + table(("mesh axes", "network ms"), [(along(names), milliseconds(t)) for names, t in axes])
    return f"{shown}\n\n{roofline(found.roofline, topology)}"


def ranked(found: Sequence[Estimate], most: int = 10) -> str:
    """The best of a sweep."""
    rows = [
        (
            " x ".join(f"{axis} {size}" for axis, size in each.mesh.items() if size > 1) or "one device",
            each.job.rows,
            gib(each.total),
            percent(each.roofline.mfu_bound),
            percent(each.roofline.mfu_serial),
            milliseconds(each.roofline.step_seconds),
            each.roofline.binding,
        )
        for each in found[:most]
    ]
    header = ("mesh", "batch", "GiB", "MFU at most", "without overlap", "step ms", "binding")
    return table(header, rows) if rows else "nothing fits"


def fitting(found: Sequence[tuple[str, Estimate]]) -> str:
    """Nearest configurations that fit."""
    rows = [(settings, gib(each.total), percent(each.roofline.mfu_bound)) for settings, each in found]
    return table(("would fit", "GiB", "MFU at most"), rows) if rows else "no configuration near this one fits"

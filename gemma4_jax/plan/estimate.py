"""Memory and roofline of a step in closed form, in milliseconds; and all meshes and batches ranked by it."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

from gemma4_jax.chips import Topology, topologies
from gemma4_jax.chips import topology as chips_topology
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.mesh_choice import training_axes
from gemma4_jax.plan.footprint import CONSTANTS, Constants, footprint
from gemma4_jax.plan.job import Job
from gemma4_jax.plan.network import places
from gemma4_jax.plan.roofline import Roofline, roofline
from gemma4_jax.plan.shares import Sizes
from gemma4_jax.plan.workload import VISITS, Visits, workload
from gemma4_jax.sharding import ACTIVATIONS, AXES, MeshConfig


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device: bytes by name, and the roofline of a step (of decode: of one token a row)."""

    job: Job
    memory: dict[str, float]
    roofline: Roofline
    room: float  # bytes that a program may take, less the total

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.room >= 0

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> devices."""
        return dict(zip(AXES, self.job.sizes, strict=True))


def estimate(
    job: Job,
    topology: Topology,
    model_flops_per_token: float,
    *,
    slices: int = 1,
    constants: Constants = CONSTANTS,
    visits: Visits = VISITS,
    memory: dict[str, float] | None = None,
) -> Estimate:
    """Memory and roofline of `job` on the devices of `topology`.

    `model_flops_per_token`: useful FLOPs of one token of the step: three forward passes in training, one else.
    `memory`: the footprint, if it is known already.
    """
    memory = memory or footprint(job, constants)
    tokens = job.rows * (1 if job.program == "decode" else job.length)
    result = roofline(workload(job, visits), places(topology, job.sizes, slices), tokens * model_flops_per_token)
    return Estimate(job, memory, result, topology.chip.device_usable_hbm - sum(memory.values()))


def sweep(
    job: Job,
    topology: Topology,
    model_flops_per_token: float,
    *,
    slices: int = 1,
    batches: Sequence[int] | None = None,
    headroom: float = 0.0,
) -> list[Estimate]:
    """Every legal mesh, each with the batch that gives it the highest bound, best first; only what fits.

    Args:
      job: everything but the mesh and the rows.
      topology: the devices.
      model_flops_per_token: as in `estimate`.
      slices: pods that the slow network joins.
      batches: sequences over all devices to try; none: 1 to 16 for each device that takes a share of the batch.
      headroom: share of the memory to leave free.
    """
    free = headroom * topology.chip.device_usable_hbm
    kept = []
    for sizes in meshes(job.cfg, topology.devices * slices, slices, job.program):
        best = None
        for tried in _with_batches(dataclasses.replace(job, sizes=sizes), batches):  # largest first
            memory = footprint(tried)
            if sum(memory.values()) + free > topology.chip.device_usable_hbm:
                continue
            found = estimate(tried, topology, model_flops_per_token, slices=slices, memory=memory)
            if best is not None and rank(found) <= rank(best):
                break  # smaller batches share out the same traffic over fewer tokens
            best = found
        if best is not None:
            kept.append(best)
    return sorted(kept, key=rank, reverse=True)


def rank(found: Estimate) -> tuple[float, float, int]:
    """The bound, then what is left of it without overlap, then the smaller batch."""
    return round(found.roofline.mfu_bound, 4), round(found.roofline.mfu_serial, 4), -found.job.rows


@functools.lru_cache(maxsize=64)
def meshes(cfg: ModelConfig, devices: int, slices: int, program: str) -> tuple[Sizes, ...]:
    """Sizes of all axes for which heads, experts and vocabulary divide. Decoding gathers no weights, so it has no fsdp."""

    def legal(sizes: Sizes) -> bool:
        if sizes[0] % slices or (program == "decode" and sizes[1] > 1):
            return False
        try:  # rows and length that always divide: what is refused is the mesh
            training_axes(cfg, MeshConfig(*sizes, slices=slices), devices, devices, devices * cfg.sliding_window)
        except UserError:
            return False
        return True

    return tuple(sizes for sizes in _factorizations(devices, len(AXES)) if legal(sizes))


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, parts - 1):
                yield (first, *rest)


def _with_batches(job: Job, batches: Sequence[int] | None) -> Iterator[Job]:
    takers = job.devices(*ACTIVATIONS["batch"])
    if job.program != "decode" and job.length % job.devices("context"):
        return
    for rows in sorted(batches or [takers * each for each in (1, 2, 4, 8, 16)], reverse=True):
        if rows % (takers * job.grad_accum) == 0:
            yield dataclasses.replace(job, rows=rows)


def alternatives(
    job: Job, topology: Topology, model_flops_per_token: float, *, slices: int = 1, headroom: float = 0.0
) -> list[tuple[str, Estimate]]:
    """The nearest configurations that fit: one setting changed, as little as will do. (settings, estimate) each.

    The same batch on another mesh, or in more parts; less kept for the backward pass; a smaller first moment; fewer
    rows; a larger topology of the same chip.
    """
    given = job
    limit = (1 - headroom) * topology.chip.device_usable_hbm

    def first(tried: Iterable[tuple[str, Job, Topology]]) -> list[tuple[str, Estimate]]:
        for settings, changed, where in tried:
            if sum(footprint(changed).values()) <= limit:
                return [(settings, estimate(changed, where, model_flops_per_token, slices=slices))]
        return []

    def changed(settings: str, where: Topology = topology, **fields) -> tuple[str, Job, Topology]:
        before = "" if job.remat == given.remat or settings == "plan.remat=full" else "plan.remat=full "
        return before + settings, dataclasses.replace(job, **fields), where

    found, takers = [], job.devices(*ACTIVATIONS["batch"])
    if job.trains and job.remat != "full":  # what follows builds on it: nothing else spares as much
        job = dataclasses.replace(job, remat="full")
        found += first([changed("plan.remat=full")])
    if job.trains:
        parts = [n for n in range(2, job.rows + 1) if job.rows % (n * takers) == 0]
        found += first(changed(f"plan.grad_accum={n}", grad_accum=n) for n in parts)
        if job.first_moment != "bfloat16":
            found += first([changed("plan.first_moment=bfloat16", first_moment="bfloat16")])
    found += _other_mesh(job, topology, model_flops_per_token, slices, headroom)
    fewer = [rows for rows in range(job.rows - takers, 0, -takers) if rows % (takers * job.grad_accum) == 0]
    found += first(changed(f"plan.batch_size={rows}", rows=rows) for rows in fewer)
    return found + first(
        changed(f"plan.topology={where.name} {_named(sizes)}", where, sizes=sizes)
        for where, sizes in _larger(job, topology, slices)
    )


def _other_mesh(
    job: Job, topology: Topology, model_flops_per_token: float, slices: int, headroom: float
) -> list[tuple[str, Estimate]]:
    same = sweep(job, topology, model_flops_per_token, slices=slices, batches=[job.rows], headroom=headroom)
    return [(_named(found.job.sizes), found) for found in same[:1]]


def _larger(job: Job, topology: Topology, slices: int) -> Iterator[tuple[Topology, Sizes]]:
    """Larger slices of the same chip, with the axis that grows best: fsdp, for decoding tensor, then context."""
    for name in topologies():
        where = chips_topology(name)
        grown, rest = divmod(where.devices, topology.devices)
        if where.chip is not topology.chip or grown < 2 or rest:
            continue
        legal = set(meshes(job.cfg, where.devices * slices, slices, job.program))
        for axis in ("tensor", "context") if job.program == "decode" else ("fsdp", "context"):
            index = AXES.index(axis)
            sizes = (*job.sizes[:index], job.sizes[index] * grown, *job.sizes[index + 1 :])
            larger = dataclasses.replace(job, sizes=sizes)
            takers = larger.devices(*ACTIVATIONS["batch"])
            if (
                sizes in legal
                and job.rows % (takers * job.grad_accum) == 0
                and job.length % larger.devices("context") == 0
            ):
                yield where, sizes


def _named(sizes: Sizes) -> str:
    return " ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)

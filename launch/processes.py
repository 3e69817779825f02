"""Several processes as one run: how they meet, which one speaks, and the mesh over all their devices."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from gemma4_jax.errors import UserError
from gemma4_jax.sharding import MeshConfig
from launch.cluster import Cluster
from launch.settings import ProcessesSection


def join(section: ProcessesSection, cluster: Cluster) -> int:
    """Meets the others of the run before anything touches a device; returns which process this is."""
    options: dict[str, Any] = {}
    if cluster.coordinator is not None:  # else JAX asks Slurm, Open MPI 4 or the TPU runtime itself
        options = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.count,
            "process_id": cluster.index,
        }
    if cluster.alone:  # nothing else in the environment counts
        options |= {"local_device_ids": cluster.local_device, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            initialization_timeout=section.meet_seconds,
            heartbeat_timeout_seconds=section.heartbeat_seconds,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"The processes of this run did not meet: {first}. Each needs the same coordinator and count, its own index, and "
            f"to start within processes.meet_seconds={section.meet_seconds} of the others."
        ) from error
    return jax.process_index()


def voice(write: Callable[[str], None]) -> Callable[[str], None]:
    """`write` on process 0, silence on the others."""
    return write if jax.process_index() == 0 else lambda _line: None


def devices(config: MeshConfig) -> list[Any]:
    """The devices this run may use."""
    have = jax.devices()
    if config.devices is not None and config.devices > len(have):
        raise UserError(f"config.mesh.devices={config.devices}, but there are {len(have)}.")
    return have[: config.devices]


def on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """What runs inside sees the mesh; nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

"""Which cluster started this process, read off its environment: nothing is imported, contacted or guessed beyond that.

A scheduler that starts one program many times says so in environment variables. `find` reads them before JAX is imported, so that a
run on a pod slice joins without a flag, and a run on one machine does not wait for anybody. What each place sets:

    Slurm        SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID inside `srun` (not in a batch script or salloc)
    Open MPI     OMPI_COMM_WORLD_SIZE and _RANK; up to version 4 OMPI_MCA_orte_hnp_uri, which says where process 0 is
    GKE, TPUs    TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, TPU_WORKER_ID; MEGASCALE_NUM_SLICES with several slices
    TPU VMs      the metadata server: worker-network-endpoints, and MEGASCALE_NUM_SLICES in tpu-env
    elsewhere    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, and JAX_PROCESS_ID or JOB_COMPLETION_INDEX (indexed jobs of
                 Kubernetes); Open MPI 5 needs the first of them
"""

import dataclasses
import glob
import os
import urllib.request
from collections.abc import Callable, Mapping

from gemma4_jax.errors import UserError
from launch.settings import ProcessesSection

Environment = Mapping[str, str]
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of one job. Where coordinator and index are None, JAX asks the cluster itself.

    `alone`: coordinator, count and index are all there is to know; JAX should not look at the environment again.
    """

    name: str
    count: int
    coordinator: str | None = None
    index: int | None = None
    local_device: int | None = None  # the one device this process has; None: all of its machine's
    alone: bool = False


def find(
    env: Environment = os.environ,
    metadata: Callable[[str], str | None] | None = None,
    has_tpu: Callable[[], bool] | None = None,
) -> Cluster | None:
    """The cluster this process belongs to; None where it is on its own.

    `metadata` and `has_tpu` ask this machine, tests say something else.

    Raises:
      UserError: the environment says that there are others, but not how to reach them.
    """
    return _told(env) or _slurm(env) or _open_mpi(env) or _tpu(env, metadata or _metadata, has_tpu or _has_tpu)


def of_run(section: ProcessesSection) -> Cluster | None:
    """The processes that the settings name, else those of the environment; None where there is but one."""
    if section.coordinator is not None:
        assert section.count is not None
        return Cluster("the settings", section.count, section.coordinator, section.index)
    found = None if section.auto is False else find()
    if section.auto and found is None:
        raise UserError(
            "config.processes.auto=true, and nothing here belongs to a cluster that is known (Slurm's srun, Open MPI, a TPU slice, "
            "or JAX_COORDINATOR_ADDRESS and its companions); set processes.coordinator, count and index instead."
        )
    return None if found is None or found.count == 1 else found


def refuse_several(task: str) -> None:
    """UserError where a task that one process does was started many times: each would wait for devices of the others."""
    found = find()
    if found is not None and found.count > 1:
        raise UserError(
            f"task={task} is one process, and {found.name} has {found.count}: start it once, on one machine of its own or with "
            "`srun --ntasks=1`, or with JAX_PLATFORMS=cpu on one host of a TPU slice."
        )


def _told(env: Environment) -> Cluster | None:
    """JAX_COORDINATOR_ADDRESS and its companions, which any launcher can set."""
    address, count = env.get("JAX_COORDINATOR_ADDRESS"), env.get("JAX_NUM_PROCESSES")
    index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX"))
    if count is None:
        if address is None and "JOB_COMPLETION_INDEX" in env and not _tpu_hosts(env):
            raise UserError(
                f"This is pod {env['JOB_COMPLETION_INDEX']} of an indexed Kubernetes job, and nothing says how many there are: set "
                "JAX_COORDINATOR_ADDRESS=HOST:PORT and JAX_NUM_PROCESSES in its manifest, or config.processes.auto=false if "
                "each pod is a run of its own."
            )
        return None
    if address is None or index is None:
        missing = "JAX_COORDINATOR_ADDRESS" if address is None else "JAX_PROCESS_ID"
        raise UserError(
            f"JAX_NUM_PROCESSES={count} is set, and {missing} is not; a run of several processes needs both."
        )
    if ":" not in address:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is HOST:PORT, got {address!r}.")
    return Cluster("the environment", _number(env, "JAX_NUM_PROCESSES"), address, _index(index, int(count)), alone=True)


def _slurm(env: Environment) -> Cluster | None:
    """Inside `srun` only: a batch script and a shell of salloc see the job, but are one process."""
    if not all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return Cluster("Slurm", _number(env, name)) if name in env else None


def _open_mpi(env: Environment) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    if "OMPI_MCA_orte_hnp_uri" in env:
        return Cluster("Open MPI", count)
    if count > 1 and "JAX_COORDINATOR_ADDRESS" not in env:
        raise UserError(
            f"Open MPI 5 started {count} processes, but does not say where process 0 is: add "
            "`-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun, with the first host and a free port."
        )
    index, local = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    return Cluster("Open MPI", count, env.get("JAX_COORDINATOR_ADDRESS"), index, local, alone=True)


def _tpu(env: Environment, metadata: Callable[[str], str | None], has_tpu: Callable[[], bool]) -> Cluster | None:
    """A slice, or several: GKE says it in variables, a TPU VM's metadata server has to be asked."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu") or not has_tpu():
        return None
    slices = env.get("MEGASCALE_NUM_SLICES")
    if hosts := _tpu_hosts(env):
        return Cluster("GKE", len(hosts.split(",")) * int(slices or 1))
    if "TPU_SKIP_MDS_QUERY" in env:
        return None
    endpoints = metadata("worker-network-endpoints")
    if endpoints is None:
        return None
    settings = dict(line.split(":", 1) for line in (metadata("tpu-env") or "").splitlines() if ":" in line)
    slices = slices or settings.get("MEGASCALE_NUM_SLICES", "1").strip().strip("'")
    return Cluster("the TPU slice", len(endpoints.split(",")) * int(slices or 1))


def _tpu_hosts(env: Environment) -> str | None:
    return env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _metadata(key: str) -> str | None:
    """An attribute of this virtual machine; None where there is no metadata server, or no such attribute."""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return answer.read().decode()
    except OSError:
        return None


def _number(env: Environment, name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(f"{name} is a number, got {env.get(name)!r}.") from None


def _index(text: str, count: int) -> int:
    if not text.isdigit() or int(text) >= count:
        raise UserError(f"The index of this process lies in 0..{count - 1}, got {text!r}.")
    return int(text)

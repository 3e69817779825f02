"""Devices that are not here: what a compiler needs to know of a TPU slice or a GPU box."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax

from gemma4_jax.chips import Topology
from gemma4_jax.errors import UserError

H100_80GB = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's GpuTargetConfigProto of an H100 SXM."""

GPUS = {"h100": H100_80GB}
PACKAGES = {"tpu": ("libtpu", "jax[tpu]"), "cuda": ("jax_cuda12_plugin", "jax[cuda12]")}
"""Platform -> the module that compiles for it, and what installs it."""


def prepare() -> None:
    """Tells jax and the compilers that no accelerator is here; in time if no device has been used yet.

    No TPU is looked for, several processes may load its library, it does not complain about a host it cannot ask for its
    name, and no GPU kernel is timed.
    """
    jax.config.update("jax_platforms", "cpu")
    # Programs of absent devices would be written to the cache but cannot be read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v6e-4",
    }.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def devices(topology: Topology, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices of a topology, for a mesh to compile for; UserError without the compiler."""
    module, package = PACKAGES[topology.chip.platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"Planning for {topology.name} needs its compiler, {module}, which is not installed: run pip install "
            f"'{package}=={jax.__version__}'; or estimate, with --config.plan.mode=estimate."
        )
    if not topology.chip.compiles:
        raise UserError(
            f"The compiler lists {topology.chip.name} by half chips, which make no mesh of it; set plan.mode=estimate."
        )
    if topology.chip.platform == "cuda" and topology.chip.name not in GPUS:
        raise UserError(
            f"{topology.name} can be estimated but not compiled for; compiled are {', '.join(GPUS)}: set plan.mode=estimate."
        )
    from jax.experimental import topologies

    prepare()
    description: dict[str, Any] = dict(topology.description)
    if slices > 1:
        description["num_slices"] = slices
    if topology.chip.platform == "cuda":
        description["target_config"] = GPUS[topology.chip.name]
    try:
        return topologies.get_topology_desc(**description).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"The compiler does not know the topology {topology.name}: {first}.") from error

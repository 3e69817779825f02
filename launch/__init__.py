"""The command line: one entry point, settings, and a program per task."""

import glob
import importlib.util
import os


def _without_accelerators() -> None:
    """Where libtpu is installed for planning and there is no TPU, keeps jax from starting it: it complains at length.

    Runs before jax is imported, which reads the variable then. Device files are how jax itself tells that a TPU is there.
    """
    planning_only = importlib.util.find_spec("libtpu") is not None and not glob.glob("/dev/accel*") + glob.glob(
        "/dev/vfio/*"
    )
    other = any(
        importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin")
    )
    if planning_only and not other:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


_without_accelerators()

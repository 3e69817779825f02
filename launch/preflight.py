"""What is bound to fail is refused before weights and data are read: no room on the disk, no room in memory."""

import math
import os
import shutil
from pathlib import Path

import jax
from jax.sharding import Mesh

from gemma4_jax.checkpoint.placement import default_device
from gemma4_jax.checkpoint.steps import absolute, committed_steps
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.lora import has_adapters
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.sharding import parameter_shardings
from gemma4_jax.train.optimizer import optimizer
from gemma4_jax.train.parts import left_out
from gemma4_jax.train.state import TrainState
from launch.abstract import Struct, abstract_model, adapted
from launch.settings import QatRun, TrainRun

GiB = 2**30


def preflight(run: TrainRun, cfg: ModelConfig, mesh: Mesh | None) -> None:
    """UserError if the checkpoints of the run, or its state and gradients alone, do not fit."""
    state = _state(run, cfg, mesh)
    if run.workdir is not None and jax.process_index() == 0:
        check_disk(Path(run.workdir), sum(map(_bytes, state.flat().values())), run.train.keep + run.train.keep_best)
    held = [*state.flat().values(), *state.base.values(), *state.params.values()]
    needed = sum(_bytes(x, local=True) for x in held)
    check_memory(needed, mesh)


def check_disk(workdir: Path, size: int, keep: int) -> None:
    """UserError unless `keep` checkpoints of `size` bytes, and one being written, fit beside those that are there."""
    place = workdir.absolute()
    there = len(committed_steps(absolute(place / "checkpoints")))
    wanted = size * max(1, keep + 1 - there)
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"config.workdir {str(workdir)!r} cannot be written; choose another one.")
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise UserError(
            f"config.workdir {str(workdir)!r} has {free / GiB:,.1f} GiB free, and the run's checkpoints take "
            f"{wanted / GiB:,.1f} GiB ({size / GiB:,.1f} GiB each, {keep} kept and one being written): free some, lower "
            "train.keep, or choose another directory."
        )


def check_memory(needed: int, mesh: Mesh | None) -> None:
    """UserError if a device has not the `needed` bytes that parameters, optimizer state and gradients take on it."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # the devices of a process share its memory
        needed *= 1 if mesh is None else len([d for d in mesh.devices.flat if d.process_index == jax.process_index()])
        room = _available()
    else:
        room = (device.memory_stats() or {}).get("bytes_limit")
    if room is not None and needed > room:
        raise UserError(
            f"Parameters, optimizer state and gradients alone take {needed / GiB:,.1f} GiB of a {device.platform} that has "
            f"{room / GiB:,.1f} GiB; `task=plan` says what fits: more devices, or optim.first_moment=bfloat16, or "
            "model.param_dtype=bfloat16."
        )


def _state(run: TrainRun, cfg: ModelConfig, mesh: Mesh | None) -> TrainState:
    if mesh is not None:
        model = abstract_model(cfg, mesh, run.model.param_dtype, run.model.dtype)
    else:
        model = map_arrays(
            lambda name, v: Struct(v.shape, v.dtype, sharding=default_device(name, v)),
            abstract(cfg, run.model.param_dtype, compute_dtype=run.model.dtype),
        )
    if run.lora is not None:
        model = adapted(model, run.lora, default_device if mesh is None else parameter_shardings(mesh))
    return TrainState.abstract(model, optimizer(run.optim, run.train.steps), frozen(run, model))


def frozen(run: TrainRun, model: Transformer) -> tuple[str, ...]:
    """Patterns of parameters that stay: parts that are not named, what is, and in QAT of a mixture of experts the router.

    Beside adapters everything else stays anyway.
    """
    if has_adapters(model):
        return run.optim.freeze
    router = isinstance(run, QatRun) and run.quant.freeze_router and model.cfg.num_experts
    return (*left_out(model, run.optim.train), *run.optim.freeze, *(("*.router.*",) if router else ()))


def _bytes(x: jax.ShapeDtypeStruct, local: bool = False) -> int:
    shape = x.sharding.shard_shape(x.shape) if local and x.sharding is not None else x.shape
    return math.prod(shape) * x.dtype.itemsize


def _available() -> int | None:
    """Bytes that this machine can still give; None where it does not say."""
    found = Path("/proc/meminfo")
    lines = found.read_text().splitlines() if found.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)

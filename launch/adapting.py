"""`config.lora`: the base a run trains adapters beside, the model with them, and what its checkpoints say about both."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from gemma4_jax.checkpoint import adapters
from gemma4_jax.checkpoint.adapters import Base
from gemma4_jax.checkpoint.load import read
from gemma4_jax.checkpoint.placement import default_device
from gemma4_jax.checkpoint.store import read_model_meta
from gemma4_jax.model import lora, packing
from gemma4_jax.model.lora import LoraConfig
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant.activations import check_calibrated
from gemma4_jax.sharding import parameter_shardings
from launch.models import make_model
from launch.settings import TrainRun


@dataclasses.dataclass(frozen=True)
class Adapting:
    """What a run with adapters knows beside its model."""

    config: LoraConfig
    base: Base

    def described(self, model: Transformer) -> dict[str, Any]:
        """For the `model` of a checkpoint's meta."""
        return {"lora": adapters.described(model, self.config, self.base)}

    def check(self, workdir: Path) -> None:
        """UserError if the run in `workdir` was trained beside another base."""
        wanted = adapters.base_of(read_model_meta(workdir))
        if wanted is not None:
            adapters.check_base(wanted, self.base.digest, str(workdir), self.base.path)


def load_base(run: TrainRun, mesh: Mesh | None, write: Callable[[str], None]) -> tuple[Transformer, Adapting | None]:
    """The model to start from, and with `config.lora` its digest; as codes where `lora.base` says so.

    Those are made in the host's memory, so that the float weights never have to fit on the devices.
    """
    if run.lora is None or run.model.path is None:
        return make_model(run.model, run.seed, mesh), None
    section, path = run.model, run.model.path
    if run.lora.base is None:
        model = make_model(section, run.seed, mesh)
    else:
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        model = read(
            path,
            dtype=section.param_dtype,
            compute_dtype=section.dtype,
            text_only=section.text_only,
            shardings=lambda _name, _variable: host,
            base=section.base,
        )
        check_calibrated(model)
    where = path if "://" in path else os.path.abspath(path)
    base = Base(where, section.param_dtype, section.text_only, adapters.base_digest(model))
    write(f"base {path}, digest {base.digest[:16]}")
    if run.lora.base is not None:
        shapes = jax.eval_shape(lambda m: m, model)
        model = packing.packed(model, packing.grids_for(shapes, run.lora.base), consume=True)
        write(packing.report(shapes, model))
        model = _placed(model, mesh)
    return model, Adapting(run.lora, base)


def with_adapters(run: TrainRun, model: Transformer, write: Callable[[str], None]) -> Transformer:
    """The model with the adapters that `config.lora` asks for, reported; the model itself without it."""
    if run.lora is None:
        return model
    adapted = lora.attach(model, run.lora, run.seed)
    write(lora.coverage(adapted, run.lora))
    return adapted


def _placed(model: Transformer, mesh: Mesh | None) -> Transformer:
    """Arrays of the host's memory where they rest on the devices."""
    place = default_device if mesh is None else parameter_shardings(mesh)

    def put(name: str, variable) -> jax.Array:
        value, sharding = variable.get_value(), place(name, variable)
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return map_arrays(put, model)

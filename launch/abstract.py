"""The programs of a run with shapes in place of arrays: what `task=plan` compiles, for devices that are not here."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma4_jax.config import ModelConfig
from gemma4_jax.infer.engine import Progress, Request, controls_of, decode_steps, prefill_step
from gemma4_jax.infer.sampler import Rule
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.gathering import own_dims
from gemma4_jax.model.kv import empty_cache
from gemma4_jax.model.parameters import in_compute_dtype, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant import policy
from gemma4_jax.quant.policy import QuantConfig
from gemma4_jax.sharding import activation_spec, parameter_shardings, use_spec
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import make_train_step

Struct = jax.ShapeDtypeStruct

BATCH = {
    "tokens": "int32",
    "positions": "int32",
    "segment_ids": "int32",
    "targets": "int32",
    "loss_weights": "float32",
}


def abstract_model(cfg: ModelConfig, mesh: Mesh, dtype: str, compute_dtype: str) -> Transformer:
    """The model, each parameter as it rests on the mesh."""
    sharding = parameter_shardings(mesh)
    model = abstract(cfg, dtype, compute_dtype=compute_dtype)
    return map_arrays(lambda name, v: Struct(v.shape, v.dtype, sharding=sharding(name, v)), model)


def lowered_training(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    optim: OptimConfig,
    dtype: str,
    compute_dtype: str,
    remat: str,
    grad_accum: int,
    quant: QuantConfig | None,
) -> jax.stages.Lowered:
    """The optimizer step of SFT, or with `quant` of QAT, with its teacher if it has one."""
    model = abstract_model(cfg, mesh, dtype, compute_dtype)
    teacher = None
    if quant is not None:
        teacher = in_compute_dtype(model, compute_dtype) if quant.distill_weight else None
        model = policy.apply(model, quant)
    transform = optimizer(optim, steps=1000)
    state = TrainState.abstract(model, transform, optim.freeze)
    batch = {name: struct(mesh, dtype, ("batch", "length"), (rows, length)) for name, dtype in BATCH.items()}
    step = make_train_step(
        model,
        transform,
        grad_accum=grad_accum,
        remat=remat,
        distill_weight=quant.distill_weight if quant else 0.0,
        reverse_kl=quant.reverse_kl if quant else False,
    )
    with jax.set_mesh(mesh):
        return step.lower(state, batch, teacher)


def lowered_prefill(
    cfg: ModelConfig, mesh: Mesh, *, rows: int, length: int, dtype: str, compute_dtype: str
) -> jax.stages.Lowered:
    """The program that reads prompts of `length` tokens into a cache of as many slots."""
    model = in_compute_dtype(abstract_model(cfg, mesh, dtype, compute_dtype), compute_dtype)
    tokens = struct(mesh, "int32", ("batch", "length"), (rows, length))
    with jax.set_mesh(mesh):
        return prefill_step.lower(model, tokens, tokens, cache_length=length)


def lowered_decode(
    cfg: ModelConfig, mesh: Mesh, *, rows: int, length: int, dtype: str, compute_dtype: str
) -> jax.stages.Lowered:
    """The program that writes tokens, with a cache of `length` slots."""
    model = in_compute_dtype(abstract(cfg, dtype, compute_dtype=compute_dtype), compute_dtype)

    def placed(_name: str, v: nnx.Variable) -> Struct:
        return Struct(v.shape, v.dtype, sharding=NamedSharding(mesh, use_spec(mesh, own_dims(v), v.shape)))

    def whole(x: Any) -> Any:
        return Struct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    decoder = map_arrays(placed, jax.eval_shape(unroll, model))
    cache = jax.eval_shape(lambda: empty_cache(cfg, rows, length, compute_dtype))
    dims = ("batch", "slots", "kv_heads", None)
    cache = jax.tree.map(lambda x: struct(mesh, x.dtype, dims[: x.ndim], x.shape), cache)
    request = Request((cfg.bos_token_id,), 1, Rule(1.0, 64, 0.95, 0.0))
    controls = jax.tree.map(whole, jax.eval_shape(lambda: controls_of([request], rows)))
    ints: Any = Struct((rows,), jnp.int32)
    ended: Any = Struct((rows,), jnp.bool_)
    progress = jax.tree.map(whole, Progress(ints, ints, ended, ints))
    with jax.set_mesh(mesh):
        return decode_steps.lower(decoder, cache, progress, controls, whole(ended))


def struct(mesh: Mesh, dtype: jax.typing.DTypeLike, dims: tuple[str | None, ...], shape: tuple[int, ...]) -> Struct:
    """An activation's shape, cut as its dims say."""
    return Struct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, activation_spec(mesh, dims, shape)))

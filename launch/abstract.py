"""The programs of a run with shapes in place of arrays: what `task=plan` compiles, for devices that are not here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma4_jax.config import ModelConfig
from gemma4_jax.infer.slots import Slots
from gemma4_jax.infer.steps import Masks, Progress, decode_steps
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.gathering import own_dims
from gemma4_jax.model.kv import CACHE_DIMS, Cache, empty_cache
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.lora import LoraConfig, adapted_shapes
from gemma4_jax.model.parameters import in_compute_dtype, map_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant import policy
from gemma4_jax.quant.policy import QuantConfig
from gemma4_jax.sharding import activation_spec, parameter_shardings, use_spec
from gemma4_jax.train.optimizer import OptimConfig, optimizer
from gemma4_jax.train.parts import left_out
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


def adapted(
    model: Transformer, lora: LoraConfig, place: Callable[[str, nnx.Variable], jax.sharding.Sharding]
) -> Transformer:
    """What a run with adapters makes of a model of shapes, each array where `place` has it."""
    new = adapted_shapes(model, lora)
    return map_arrays(lambda name, v: Struct(v.shape, v.dtype, sharding=place(name, v)), new)


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
    quant: QuantConfig | None = None,
    lora: LoraConfig | None = None,
) -> jax.stages.Lowered:
    """The optimizer step of SFT; with `quant` of QAT, with its teacher if it has one; with `lora` of adapters alone."""
    model = abstract_model(cfg, mesh, dtype, compute_dtype)
    teacher = None
    if lora is not None:
        model = adapted(model, lora, parameter_shardings(mesh))
    if quant is not None:
        teacher = in_compute_dtype(model, compute_dtype) if quant.distill_weight else None
        model = policy.apply(model, quant)
    transform = optimizer(optim, steps=1000)
    stays = () if lora is not None else left_out(model, optim.train)
    state = TrainState.abstract(model, transform, (*stays, *optim.freeze))
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
    """A program that reads whole prompts of `length` tokens into a cache of as many slots.

    The engine reads them in chunks, with less memory; this is the bound that leaves them whole.
    """
    model = in_compute_dtype(abstract_model(cfg, mesh, dtype, compute_dtype), compute_dtype)
    tokens = struct(mesh, "int32", ("batch", "length"), (rows, length))
    with jax.set_mesh(mesh):
        return _read_whole.lower(model, tokens, tokens, length=length)


@functools.partial(jax.jit, static_argnames="length")
def _read_whole(
    model: Transformer, tokens_BT: jax.Array, positions_BT: jax.Array, *, length: int
) -> tuple[Cache, jax.Array]:
    """The cache that prompts leave behind, and the logits [B, V] after the last token of each."""
    hidden, cache = model.prefill(tokens_BT, positions_BT, length, cache_format=CacheFormat.of(model.cfg))
    last_B = jnp.argmax(positions_BT, axis=1)
    return cache, model.logits(jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0])


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
    cache_format = CacheFormat.of(cfg)
    cache = jax.eval_shape(lambda: empty_cache(cfg, rows, length, compute_dtype, cache_format=cache_format))

    def in_slots(x: Any) -> Any:
        return struct(mesh, x.dtype, CACHE_DIMS if x.ndim > 2 else ("batch", "slots"), x.shape)

    cache = jax.tree.map(in_slots, cache)
    controls = jax.tree.map(whole, Slots.empty(rows).controls)
    ints: Any = Struct((rows,), jnp.int32)
    ended: Any = Struct((rows,), jnp.bool_)
    progress = jax.tree.map(whole, Progress(ints, ints, ended, ints))
    words: Any = Struct((rows, -(-cfg.vocab_size // 32)), jnp.uint32)
    flag: Any = Struct((), jnp.bool_)
    steps: Any = Struct((), jnp.int32)
    masks = jax.tree.map(whole, Masks(words, flag))
    with jax.set_mesh(mesh):
        return decode_steps.lower(
            decoder,
            cache,
            progress,
            controls,
            whole(ended),
            masks,
            whole(steps),
            whole(flag),
            None,
            cache_format=cache_format,
        )


def struct(mesh: Mesh, dtype: jax.typing.DTypeLike, dims: tuple[str | None, ...], shape: tuple[int, ...]) -> Struct:
    """An activation's shape, cut as its dims say."""
    return Struct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, activation_spec(mesh, dims, shape)))

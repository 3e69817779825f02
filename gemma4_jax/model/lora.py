"""Low-rank adapters: which weights get one, the model with them, the model with them added in.

The base stays as it is and only the adapters are trained. A linear map without a grid multiplies with its adapter beside the
weight, so no gradient of the weight is ever made. Where a grid wants the sum (LoRA under QAT), and in experts, whose rows are
sorted only inside their kernel, the adapter is added to the weight before use, layer by layer; then the weight's gradient exists
for one layer at a time, and costs what it costs in full training, but no optimizer state follows from it.
"""

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.model import packing
from gemma4_jax.model.gathering import own_dims
from gemma4_jax.model.linear import Adapter, Weight
from gemma4_jax.model.parameters import map_arrays, modules, variables
from gemma4_jax.options import option
from gemma4_jax.quant.activations import SCALES
from gemma4_jax.quant.modules import copied, map_where
from gemma4_jax.quant.packed import Packed
from gemma4_jax.quant.policies import PolicyName
from gemma4_jax.sharding import parameter_shardings
from gemma4_jax.tables import percent, table

M = TypeVar("M", bound=nnx.Module)

MARK = ".adapter."
"""In the name of every adapter's array, and of nothing else."""

RANK = "lora_rank"
TEXT_PARTS = ("own.", "shared.", "per_layer.")
"""How names of the decoder's arrays begin, but for the token table and the last norm."""

ROLES = {
    "attention": ("attention",),
    "mlp": ("ffw", "ffw_shared"),
    "experts": ("experts",),
    "per_layer": ("per_layer",),
    "per_layer_projection": ("per_layer_projection",),
    "router": ("router",),
    "all": ("attention", "ffw", "ffw_shared", "experts", "per_layer", "per_layer_projection"),
}
"""Targets that are groups of weights; `all` leaves the router alone, whose change moves tokens between experts."""

PARTS = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "experts.gate_up_proj": "sparse.experts.gate_up",
    "experts.down_proj": "sparse.experts.down",
    "per_layer_gate": "per_layer.gate",
    "per_layer_out": "per_layer.out",
}
"""Targets that are one weight of every layer, in the names Hugging Face has for them."""

TARGETS = (*ROLES, *PARTS)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train small matrices beside the weights, and leave the weights alone."""

    targets: tuple[str, ...] = option(
        ("attention", "mlp"), f"what gets adapters: {', '.join(TARGETS)}, or patterns such as 'own.full.*'"
    )
    rank: int = option(16, "columns of A and rows of B")
    alpha: float = option(32.0, "the adapter's product counts alpha / rank times")
    rslora: bool = option(False, "alpha / sqrt(rank) instead, which keeps large ranks learning (arXiv 2312.03732)")
    base: PolicyName | None = option(
        None, "QLoRA: hold the base as this policy's codes (linear maps and experts; tables stay); none: as it is"
    )

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError(f"lora.targets is empty, so nothing would be trained; known: {', '.join(TARGETS)}.")
        if self.rank < 1:
            raise UserError(f"lora.rank is at least 1, got {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is above 0, got {self.alpha}.")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def matched(model: nnx.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """Target -> dotted paths of the weights it names; the towers' are never among them.

    Raises:
      UserError: a target that is no name, or that names nothing of this model.
    """
    weights = {
        path: module for path, module in modules(model) if isinstance(module, Weight) and path.startswith(TEXT_PARTS)
    }
    present = sorted({target for target in TARGETS if _named(weights, target)})
    found = {}
    for target in targets:
        found[target] = _named(weights, target)
        if found[target]:
            continue
        if target in TARGETS:
            raise UserError(
                f"lora.targets has {target!r}, but this model has no such weights; it has {', '.join(present)}."
            )
        raise UserError(f"lora.targets has {target!r}, which names no weight; {did_you_mean(target, present)}")
    return found


def attach(model: M, config: LoraConfig, seed: int = 0) -> M:
    """The same arrays in new modules, with adapters where `config.targets` says: A random, B zero, so nothing changes yet.

    Arrays may be abstract, then the adapters' are. On a mesh each adapter rests as `sharding` has it. `config.base` is not
    looked at: `model.packing` is for that.

    A is uniform within 1 / sqrt(inputs), as PEFT draws it; each adapter has its own draw, whatever else is adapted.

    Raises:
      UserError: what `matched` refuses; a model that has adapters; a rank beyond a weight's own.
    """
    if has_adapters(model):
        raise UserError("This model has adapters already; merge them before it gets others.")
    chosen = {path for paths in matched(model, config.targets).values() for path in paths}
    made = shaped(model, chosen, config)
    new = adapters(made)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        return made
    inputs = {path: math.prod(_shape(module)[1]) for path, module in modules(made) if isinstance(module, Weight)}

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        return {name: _drawn(key, name, v, inputs[name.split(MARK)[0]]) for name, v in new.items()}

    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else parameter_shardings(mesh)
    shardings = None if place is None else {name: place(name, variable) for name, variable in new.items()}
    values = jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    return map_arrays(lambda name, variable: values.get(name, variable.get_value()), made)


def adapted_shapes(model: M, config: LoraConfig) -> M:
    """What a run makes of a model, as shapes wherever they lie: the base as codes if it is to be, with adapters."""
    if config.base is not None:
        model = packing.packed(model, packing.grids_for(model, config.base))
    return attach(model, config)


def shaped(model: M, paths: Collection[str], config: LoraConfig) -> M:
    """The model with adapters without values (ShapeDtypeStructs) at these weights."""
    known = {path for path, module in modules(model) if isinstance(module, Weight)}
    if unknown := sorted(set(paths) - known):
        raise UserError(f"There are adapters for {', '.join(unknown[:3])}, which this model does not have.")

    def visit(path: str, module: Weight) -> Weight:
        new = copied(module)
        if path in paths:
            new.adapter = _blank(path, module, config)
        return new

    return map_where(_is_weight, visit, model)


def merged(model: M, dtype: jax.typing.DTypeLike | None = None) -> M:
    """The model with its adapters added to its weights, and codes decoded: no adapters, the grids it had.

    Args:
      model: with adapters.
      dtype: of the changed weights; None: of the embedding, and float32 where a grid rounds them: a narrower sum may round
        to another code.
    """
    embedding = next(v.get_value() for name, v in variables(model).items() if name == "embed.w")

    def visit(_: str, module: Weight) -> Weight:
        new = copied(module)
        if module.adapter is None and module.packed is None:
            return new
        kept = jnp.dtype(dtype or (jnp.float32 if module.grid is not None else embedding.dtype))
        value = _sum(module, kept)
        if module.packed is None:
            value = jax.device_put(value, module.w.get_value().sharding)
        new.w = nnx.Param(value, dims=module.w.dims)
        new.adapter = new.packed = new.packed_scale = None
        return new

    return map_where(_is_weight, visit, model)


def adapters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The adapters' variables by dotted path."""
    return {name: variable for name, variable in variables(model).items() if MARK in name}


def has_adapters(model: nnx.Module) -> bool:
    """Whether any weight has one."""
    return any(MARK in name for name in variables(model))


def base_names(model: nnx.Module) -> frozenset[str]:
    """Arrays that come from the base checkpoint: all but adapters and the scales of activations."""
    return frozenset(n for n in variables(model) if MARK not in n and n.rsplit(".", 1)[-1] not in SCALES)


def coverage(model: nnx.Module, config: LoraConfig) -> str:
    """What is trained beside what: a line per kind of weight with an adapter, and a total."""
    rows: dict[tuple[str, str], list[int]] = {}
    linears = [(path, module) for path, module in modules(model) if isinstance(module, Weight)]
    for path, module in linears:
        if module.adapter is None:
            continue
        row = rows.setdefault((module.role, ".".join(path.split(".")[-2:])), [0, 0, 0])
        lead, inputs, outputs = _shape(module)
        row[0] += math.prod(lead)
        row[1] += math.prod((*lead, *inputs, *outputs))
        row[2] += sum(math.prod(x.shape) for x in jax.tree.leaves(module.adapter))
    total = sum(math.prod(part) for _, module in linears for part in [sum(_shape(module), ())])
    added = sum(row[2] for row in rows.values())
    lines = [(role, name, *row, percent(row[2] / row[1])) for (role, name), row in sorted(rows.items())]
    sums = [sum(row[i] for row in rows.values()) for i in range(3)]
    lines.append(("all", "", *sums, f"{percent(added / max(total, 1))} of all"))
    head = f"adapters of rank {config.rank}; A B counts {config.scale:.4g} times"
    return f"{head}\n{table(('weights', 'name', 'matrices', 'parameters', 'trained', 'share'), lines)}"


def _named(weights: Mapping[str, Weight], target: str) -> list[str]:
    if target in ROLES:
        return [path for path, module in weights.items() if module.role in ROLES[target]]
    if target in PARTS:
        return [path for path in weights if path.endswith("." + PARTS[target])]
    return [path for path in weights if fnmatch.fnmatchcase(path, target)]


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def _shape(module: Weight) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of the stack, the inputs and the outputs, also of a weight that is stored as codes."""
    shape = module.w.get_value().shape
    cut, end = len(shape) - module.n_in - module.n_out, len(shape) - module.n_out
    inputs = shape[cut:end]
    if isinstance(module.packed, Packed):
        inputs = (*inputs[:-1], inputs[-1] * module.packed.per_byte)
    return shape[:cut], inputs, shape[end:]


def _blank(path: str, module: Weight, config: LoraConfig) -> Adapter:
    """An adapter of shapes."""
    lead, inputs, outputs = _shape(module)
    largest = min(math.prod(inputs), math.prod(outputs))
    if config.rank > largest:
        raise UserError(
            f"lora.rank={config.rank} is beyond that of {path}, which is {largest}; choose a smaller one, or leave it out of "
            "lora.targets."
        )
    names = own_dims(module.w)
    cut, end = len(lead), len(lead) + len(inputs)
    return Adapter(
        jax.ShapeDtypeStruct((*lead, *inputs, config.rank), jnp.float32),
        jax.ShapeDtypeStruct((*lead, config.rank, *outputs), jnp.float32),
        scale=config.scale,
        a_dims=(*names[:end], RANK),
        b_dims=(*names[:cut], RANK, *names[end:]),
    )


def _drawn(key: jax.Array, name: str, variable: nnx.Variable, inputs: int) -> jax.Array:
    shape = variable.get_value().shape
    if name.endswith(".b"):
        return jnp.zeros(shape, jnp.float32)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.uniform(own, shape, jnp.float32, -1.0, 1.0) * inputs**-0.5


@functools.partial(jax.jit, static_argnums=1)
def _sum(module: Weight, dtype: jnp.dtype) -> jax.Array:
    w = module.decoded()
    if module.adapter is not None:
        w = w.astype(jnp.float32) + module.adapter.product(module.n_in)
    return w.astype(dtype)

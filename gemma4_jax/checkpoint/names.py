"""The one table of names: every Hugging Face tensor is a view of one place in one of our parameters.

A transform is a view, not a copy, so the same table serves reading (assign to the view) and writing (read from it), and
what is not a bijection cannot be written down. Source: transformers 5.23, models/gemma4/modeling_gemma4.py.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from gemma4_jax.checkpoint import names_towers
from gemma4_jax.config import ModelConfig
from gemma4_jax.model.linear import Weight
from gemma4_jax.model.parameters import modules, variables
from gemma4_jax.model.stack import LayerStack
from gemma4_jax.model.transformer import abstract

MULTIMODAL_PREFIX = "model.language_model."
TEXT_PREFIX = "model."
TOWERS = names_towers.PREFIXES
HEAD = "lm_head.weight"
"""The tied output head: some files store it beside the embedding it equals."""

_TOP = {
    "embed.w": "embed_tokens.weight",
    "per_layer.table.w": "embed_tokens_per_layer.weight",
    "per_layer.projection.w": "per_layer_model_projection.weight",
    "per_layer.norm.scale": "per_layer_projection_norm.weight",
    "final_norm.scale": "norm.weight",
}
LAYER = {
    "pre_attention_norm.scale": "input_layernorm.weight",
    "attention.q.w": "self_attn.q_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k.w": "self_attn.k_proj.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "attention.v.w": "self_attn.v_proj.weight",
    "attention.o.w": "self_attn.o_proj.weight",
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "pre_ffw_norm.scale": "pre_feedforward_layernorm.weight",
    "mlp.gate.w": "mlp.gate_proj.weight",
    "mlp.up.w": "mlp.up_proj.weight",
    "mlp.down.w": "mlp.down_proj.weight",
    "post_ffw_norm.scale": "post_feedforward_layernorm.weight",
    "sparse.dense_norm.scale": "post_feedforward_layernorm_1.weight",
    "sparse.pre_norm.scale": "pre_feedforward_layernorm_2.weight",
    "sparse.post_norm.scale": "post_feedforward_layernorm_2.weight",
    "sparse.router.proj.w": "router.proj.weight",
    "sparse.router.scale": "router.scale",
    "sparse.router.per_expert_scale": "router.per_expert_scale",
    "sparse.experts.gate_up.w": "experts.gate_up_proj",
    "sparse.experts.down.w": "experts.down_proj",
    "per_layer.gate.w": "per_layer_input_gate.weight",
    "per_layer.out.w": "per_layer_projection.weight",
    "per_layer.norm.scale": "post_per_layer_input_norm.weight",
    "layer_scalar": "layer_scalar",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a Hugging Face tensor of `shape` lives: `parameter[index]`.

    `inputs`, `outputs`: dims of a matrix. Ours is [*lead, *inputs, *outputs], theirs [*lead, outputs, inputs]; None for
    what both sides store alike.
    """

    parameter: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int | None = None
    outputs: int | None = None

    def view(self, own: np.ndarray) -> np.ndarray:
        """`own` = `parameter[index]` (C-contiguous) in the shape of the Hugging Face tensor, sharing its memory."""
        if self.inputs is None or self.outputs is None:
            return own.reshape(self.shape)
        matrix = np.swapaxes(own.reshape(_matrix(own.shape, self.inputs, self.outputs)), -1, -2)
        # A kernel of a convolution: the inputs' dims apart. Splitting an axis is always a view.
        return matrix if matrix.shape == self.shape else matrix.reshape(self.shape)


@functools.lru_cache(maxsize=8)
def table(cfg: ModelConfig) -> dict[str, Entry]:
    """Every tensor of a checkpoint -> its place; layer by layer, as files are written.

    The text model's names stand without their prefix, the towers' with it (`TOWERS`, see `in_file`). Every element of every
    parameter is in exactly one entry. Treat the result as read-only.
    """
    model = abstract(cfg)
    matrices = {f"{path}.w": module for path, module in modules(model) if isinstance(module, Weight)}
    found: dict[str, Entry] = {}
    for parameter, variable in variables(model).items():
        shape: tuple[int, ...] = variable.get_value().shape
        for name, index in _places(model, parameter):
            own = shape[len(index) :]
            weight = matrices.get(parameter)
            special = names_towers.file_shape(parameter, own) if names_towers.is_tower(parameter) else None
            if special is not None and weight is not None:
                found[name] = Entry(parameter, index, special, weight.n_in, weight.n_out)
            elif special is not None:
                found[name] = Entry(parameter, index, special)
            elif weight is None:
                found[name] = Entry(parameter, index, own or (1,))
            else:
                *lead, rows, columns = _matrix(own, weight.n_in, weight.n_out)
                found[name] = Entry(parameter, index, (*lead, columns, rows), weight.n_in, weight.n_out)
    return dict(sorted(found.items(), key=_file_order))


def in_file(name: str, prefix: str) -> str:
    """A name of the table as a file has it whose text tensors begin with `prefix`."""
    return name if name.startswith(TOWERS) else prefix + name


def dead(cfg: ModelConfig) -> frozenset[str]:
    """Tensors that files may hold for layers which read another layer's keys and values; nothing reads them."""
    first = cfg.num_hidden_layers - cfg.num_kv_shared_layers
    tensors = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    return frozenset(
        f"layers.{layer}.self_attn.{tensor}" for layer in range(first, cfg.num_hidden_layers) for tensor in tensors
    )


def _places(model: Any, parameter: str) -> list[tuple[str, tuple[int, ...]]]:
    """The names of one parameter's tensors and the index of each."""
    if parameter in _TOP:
        return [(_TOP[parameter], ())]
    if names_towers.is_tower(parameter):
        return names_towers.places(parameter, variables(model)[parameter].get_value().shape)
    stack_name, kind, rest = parameter.split(".", 2)
    stack: LayerStack = getattr(model, stack_name)
    plan, suffix = stack.plan, LAYER[rest]
    if kind == "full":
        return [(f"layers.{plan.layer(block, plan.sliding)}.{suffix}", (block,)) for block in range(plan.blocks)]
    return [
        (f"layers.{plan.layer(block, i)}.{suffix}", (block, i))
        for block in range(plan.blocks)
        for i in range(plan.sliding)
    ]


def _matrix(shape: tuple[int, ...], inputs: int, outputs: int) -> tuple[int, ...]:
    """[*lead, *inputs, *outputs] -> [*lead, inputs, outputs]."""
    cut = len(shape) - inputs - outputs
    return (*shape[:cut], math.prod(shape[cut : cut + inputs]), math.prod(shape[cut + inputs :]))


def _file_order(item: tuple[str, Entry]) -> tuple[int, ...]:
    """Embeddings, then layers in order, then the rest; inside a layer in the order of `LAYER`; then the towers."""
    name = item[0]
    if name.startswith(TOWERS):
        return 1 << 31, *names_towers.order(name)
    layer = re.match(r"layers\.(\d+)\.(.*)", name)
    if layer:
        return int(layer[1]), list(LAYER.values()).index(layer[2])
    return (-1 if name.startswith("embed_tokens") else 1 << 30), list(_TOP.values()).index(name)

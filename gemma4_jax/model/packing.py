"""A model whose weights are held as codes, a quarter of the bytes of bfloat16: to sample from, tables too, and for QLoRA."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.errors import UserError
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.gathering import own_dims
from gemma4_jax.model.linear import Buffer, Weight
from gemma4_jax.model.parameters import modules
from gemma4_jax.quant.grids import grid_named
from gemma4_jax.quant.modules import copied, map_where
from gemma4_jax.quant.packed import Packed
from gemma4_jax.quant.policies import PolicyName
from gemma4_jax.quant.policy import QuantConfig, apply
from gemma4_jax.tables import table

M = TypeVar("M", bound=nnx.Module)

PART = 1 << 25
"""Numbers of a table that are rounded at a time."""

LOOKED_UP = "per_layer_embedding"
"""The role of the table that is only read by rows: most of E2B's bytes."""


def grids_for(model: nnx.Module, policy: PolicyName) -> dict[str, str]:
    """Dotted path of a linear map or of experts -> name of the grid it is to be held on: its own, else the policy's.

    Raises:
      UserError: the policy is for other models, or a weight does not divide into blocks.
    """
    gridded = apply(model, QuantConfig(policy=policy, activations="none", kv_cache="none"))
    own = {path: module.grid for path, module in _weights(model).items()}
    chosen = {path: own[path] or module.grid for path, module in _weights(gridded).items()}
    return {path: grid.name for path, grid in chosen.items() if grid is not None}  # pyright: ignore[reportAttributeAccessIssue]


def packed(model: M, grids: Mapping[str, str], *, consume: bool = False) -> M:
    """The model with the weights at these paths as codes; they have no grid any more, tables keep theirs. Arrays may be abstract.

    A weight that lies on that grid already, with learned scales or not, keeps its codes; an adapter it has is in them, and gone.
    With `consume` a weight's array is deleted once its codes exist, so that not all exist twice. Tables may be among the paths; not
    on a mesh.

    Raises:
      UserError: a path that is no weight here, or a weight whose codes do not fill bytes.
    """
    if unknown := sorted(grids.keys() - _weights(model).keys() - tables(model)):
        raise UserError(f"The codes of {', '.join(unknown[:3])} have no place in this model.")

    def visit(path: str, module: Weight | Embedding) -> Weight | Embedding:
        new = copied(module)
        if path not in grids:
            return new
        if module.grid is None or getattr(module.grid, "name", None) != grids[path]:
            module = copied(module)
            module.grid, module.grid_scale = grid_named(grids[path]), None
        form = Packed(module.grid)  # pyright: ignore[reportArgumentType]
        w = module.w.get_value()
        abstract = isinstance(w, jax.ShapeDtypeStruct)
        if abstract:
            codes, scale = jax.eval_shape(lambda m: _codes(m, form), module)
        elif isinstance(module, Embedding):
            codes, scale = _table_codes(module, form)
        else:
            codes, scale = _codes_now(module, form)
        names = own_dims(module.w)
        n_in, n_out = (module.n_in, module.n_out) if isinstance(module, Weight) else (len(names) - 1, 0)
        end = len(names) - n_out
        new.w = Buffer(codes, dims=names, exact=True)  # pyright: ignore[reportAttributeAccessIssue]  # not trained
        new.packed_scale = Buffer(scale, dims=(*names[: end - n_in], "scale_blocks", *names[end:]), exact=True)
        new.packed, new.grid, new.grid_scale = form, None, None
        if isinstance(new, Weight):
            new.adapter = None
        if consume and not abstract:
            jax.block_until_ready((codes, scale))
            w.delete()
        return new

    return map_where(lambda node: isinstance(node, Weight | Embedding), visit, model)


def tables(model: nnx.Module) -> set[str]:
    """Dotted paths of the embeddings of tokens, and of tokens and layers."""
    return {path for path, module in modules(model) if isinstance(module, Embedding)}


def packed_names(model: nnx.Module) -> dict[str, str]:
    """Dotted path of a weight -> the grid whose codes it holds: what `packed` takes."""
    return {path: module.packed.name for path, module in _weights(model).items() if isinstance(module.packed, Packed)}


def report(before: nnx.Module, after: nnx.Module) -> str:
    """Bytes of the base, by grid; `before` may be abstract."""
    old, new = _weights(before), _weights(after)
    rows: dict[str, list[float]] = {}
    for path, module in new.items():
        name = module.packed.name if isinstance(module.packed, Packed) else "float"
        row = rows.setdefault(name, [0, 0, 0])
        row[0] += 1
        row[1] += _bytes(old[path].w) / 1e6
        row[2] += (_bytes(module.w) + _bytes(module.packed_scale)) / 1e6
    lines = [(name, int(row[0]), f"{row[1]:,.2f}", f"{row[2]:,.2f}") for name, row in sorted(rows.items())]
    return table(("base held as", "arrays", "MB before", "MB"), lines)


def _weights(model: nnx.Module) -> dict[str, Weight]:
    return {path: module for path, module in modules(model) if isinstance(module, Weight)}


def _codes(module: Weight | Embedding, form: Packed) -> tuple[jax.Array, jax.Array]:
    """uint8 codes with the last input dim shorter, scales [*stack, blocks, *outputs]; of a table shorter rows, [V, blocks]."""
    codes, scale = module.encoded()
    if isinstance(module, Embedding):
        return form.pack(codes, -1), scale
    w = module.w.get_value()
    cut, end = w.ndim - module.n_in - module.n_out, w.ndim - module.n_out
    form.check(w.shape[end - 1])
    small = (*w.shape[: end - 1], w.shape[end - 1] // form.per_byte, *w.shape[end:])
    return form.pack(codes, -2).reshape(small), scale.reshape(*w.shape[:cut], -1, *w.shape[end:])


_codes_now = jax.jit(_codes, static_argnums=1)


def _table_codes(module: Embedding, form: Packed) -> tuple[jax.Array, jax.Array]:
    """The same of a table, some rows at a time: rounding holds what it rounds in float32, 9.4 GB of E2B's largest."""
    w = module.w.get_value()
    # A view, where XLA for CPUs would turn all of a bfloat16 table into float32 to slice it.
    rows = np.asarray(w) if jax.default_backend() == "cpu" else w
    count = max(1, PART // w.shape[1])
    parts = []
    for start in range(0, len(rows), count):
        part = copied(module)
        part.w = module.w.replace(jnp.asarray(rows[start : start + count]))  # pyright: ignore[reportAttributeAccessIssue]
        parts.append(_codes_now(part, form))
    codes, scale = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return codes, scale


def _bytes(variable: nnx.Variable | None) -> int:
    if variable is None:
        return 0
    value = variable.get_value()
    return value.size * value.dtype.itemsize

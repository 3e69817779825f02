"""Parameters on their way from where they rest on the mesh to where a layer multiplies with them."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from gemma4_jax.kernels.slices import as_it_lies
from gemma4_jax.kernels.vocabulary import narrowed
from gemma4_jax.model.linear import Adapter, Weight, holding, multiplies_in
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.sharding import current_mesh, gather, rest, use_spec, used

M = TypeVar("M", bound=nnx.Module | None)
N = TypeVar("N", bound=nnx.Module)


def gathered(module: M, dtype: jax.typing.DTypeLike) -> M:
    """The module with its parameters cut as they are used; the module itself without a mesh.

    A weight is rounded to its grid and cast to `dtype` where it rests, and only then gathered: each device rounds its own
    share, and half as many bytes travel. The router computes in float32 and is gathered so. Called on a layer
    inside the scan (and again by its recomputation), so that the gathered weights of one layer exist at a time.
    """
    if current_mesh() is None:
        return module
    # Without the barrier XLA casts the whole stack of layers before the loop and keeps the copy. This barrier and that of
    # `expert_routes` together took six layers of 26B-A4B on 16 devices from 7.58 to 7.34 GiB. One for each array: the derivative
    # of one for all would compute the gradients of frozen weights too.
    module = jax.tree.map(lambda x: as_it_lies(jax.lax.optimization_barrier(x)), module)

    def ready(node):
        if isinstance(node, Weight):
            used_in = multiplies_in(node.role, dtype) or node.w.get_value().dtype
            new = holding(node, _weight(node, used_in))
            if new.adapter is not None:
                new.adapter = _adapter(new.adapter, used_in)
            return new
        return node.replace(gather(node.get_value(), own_dims(node)))

    is_leaf = lambda node: isinstance(node, Weight | nnx.Variable)  # noqa: E731
    return jax.tree.map(ready, module, is_leaf=is_leaf)


def in_use(model: N) -> N:
    """The whole model placed as its parameters are used, outside of any program; as it is without a mesh.

    For decoding: a step that gathered weights would move them all for one token.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return model

    def placed(_name: str, variable: nnx.Variable) -> jax.Array:
        value = variable.get_value()
        return jax.device_put(value, NamedSharding(mesh, use_spec(mesh, own_dims(variable), value.shape)))

    return map_arrays(placed, model)


def _weight(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    if weight.packed is not None:
        return _unpacked(weight, dtype)
    dims, w = own_dims(weight.w), weight.w.get_value()
    if weight.plain:
        # A plain cast moves out of the loop: XLA then holds every layer's weights twice, on v5p in tiles of which 1/32 is used.
        return gather(narrowed(w, dtype), dims)
    # Blocks of a grid run along the inputs, so those are whole while the weight is rounded.
    ends = len(dims) - weight.n_out
    whole = () if weight.grid is None else dims[ends - weight.n_in : ends]
    w = rest(w, dims, whole)
    if weight.adapter is not None and weight.sums:
        w = w.astype(jnp.float32) + rest(weight.adapter.product(weight.n_in), dims, whole)
    w = narrowed(w, dtype) if weight.grid is None else weight.rounded(w).astype(dtype)
    return gather(w, dims, whole)


def _unpacked(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Codes travel, at most half of the bytes of bfloat16, and each device decodes what it uses."""
    assert weight.packed_scale is not None
    codes, scale = (used(x.get_value(), own_dims(x)) for x in (weight.w, weight.packed_scale))
    w = weight.decoded(codes, scale)
    if weight.adapter is not None and weight.sums:
        w = w + _adapter(weight.adapter, jnp.float32).product(weight.n_in)
    return narrowed(w, dtype) if weight.grid is None else weight.rounded(w).astype(dtype)


def _adapter(adapter: Adapter, dtype: jax.typing.DTypeLike) -> Adapter:
    """Both factors cut as they are used; cast where they rest, as weights are."""

    def ready(variable):
        return variable.replace(gather(narrowed(variable.get_value(), dtype), own_dims(variable)))

    return jax.tree.map(ready, adapter, is_leaf=lambda node: isinstance(node, nnx.Variable))


def own_dims(variable: nnx.Variable) -> tuple[str, ...]:
    """Names of the array's own dims: a scan has taken the stack's dims off the array, not off the names."""
    return variable.dims[len(variable.dims) - variable.get_value().ndim :]

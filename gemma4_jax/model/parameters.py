"""A model's parameters by name: `own.sliding.attention.q.w`, in the tree's own order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from gemma4_jax.model.linear import Buffer, multiplies_in

M = TypeVar("M", bound=nnx.Module)


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable (its array, its dim names in `.dims`) by dotted path; arrays may be abstract."""
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): variable for path, variable in found}


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    """Every array by dotted path."""
    return {name: variable.get_value() for name, variable in variables(model).items()}


def map_arrays(fn: Callable[[str, nnx.Variable], Any], model: M) -> M:
    """The same tree with each variable's array replaced by fn(name, variable); None leaves a hole without leaves."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731

    def visit(path, variable):
        return variable.replace(fn(jax.tree_util.keystr(path, simple=True, separator="."), variable))

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_variable)


def with_arrays(model: M, new: Mapping[str, Any]) -> M:
    """The model with all its arrays taken from `new` by name; a missing name is a KeyError."""
    return map_arrays(lambda name, _: new[name], model)


def inside(module: str, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Of values by name those that lie in this module, by their names in it."""
    return {name.removeprefix(f"{module}."): x for name, x in of_model.items() if name.startswith(f"{module}.")}


def in_compute_dtype(model: M, dtype: str) -> M:
    """The model with its weights stored as its layers use them, arrays abstract or not: half the memory, the same numbers.

    For a model that is not trained. Norms and scalars, which work in float32, stay as they are.
    """
    narrow = {
        f"{path}.w"
        for path, module in modules(model)
        if (role := getattr(module, "role", None)) is not None and multiplies_in(role, dtype) is not None
    }

    def stored(name: str, variable: nnx.Variable):
        value = variable.get_value()
        if name not in narrow or value.dtype == dtype or not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
            return value  # codes stay codes
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, jax.numpy.dtype(dtype), sharding=value.sharding)
        return value.astype(dtype)

    return map_arrays(stored, model)


def is_trainable(variable: nnx.Variable) -> bool:
    """False for buffers: they stand in checkpoints but get no gradient step and no decay."""
    return not isinstance(variable, Buffer)


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module inside the model with its dotted path, the model itself first."""

    def visit(path: str, module: nnx.Module):
        yield path, module
        for key, value in vars(module).items():
            items = enumerate(value) if isinstance(value, nnx.List) else [("", value)]
            for index, item in items:
                if isinstance(item, nnx.Module):
                    yield from visit(".".join(part for part in (path, key, str(index)) if part), item)

    yield from visit("", model)

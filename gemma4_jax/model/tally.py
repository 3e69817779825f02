"""Gradients of stacked layers that add up where they lie, instead of in a second copy of all of them.

The derivative of a scan over layers stacks the layers' gradients; to add them to those of earlier micro-batches takes both at once.
Here the sums so far travel through the backward pass as a cotangent, and each layer adds its own to its slice in place.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from gemma4_jax.model.parameters import arrays, inside, with_arrays

M = TypeVar("M", bound=nnx.Module)
Arrays = Mapping[str, jax.Array]


class Tally(NamedTuple):
    """Of one stack, by dotted path inside it: what to differentiate by, in place of the parameters, and the sums so far.

    The derivative by `zeros` is `totals` plus the parameters' gradients. `zeros` are never read: XLA makes no array of them.
    """

    zeros: dict[str, jax.Array]
    totals: dict[str, jax.Array]


def linked(layer: M, rows: Arrays, index: tuple[jax.Array, ...]) -> tuple[M, Arrays]:
    """The layer, whose gradients go to `rows`[index] from now on, not to its arrays; and `rows`, for the next layer."""
    values = arrays(layer)
    out, rows = _link({name: values[name] for name in rows}, rows, index)
    return with_arrays(layer, {**values, **out}), rows


@jax.custom_vjp
def _link(values: Arrays, rows: Arrays, index: tuple[jax.Array, ...]) -> tuple[Arrays, Arrays]:
    return values, rows


def _link_forward(values: Arrays, rows: Arrays, index: tuple[jax.Array, ...]) -> Any:
    return (values, rows), index


def _link_backward(index: tuple[jax.Array, ...], cotangents: tuple[Arrays, Arrays]) -> Any:
    gradients, sums = cotangents
    return None, {name: sums[name].at[index].add(gradients[name].astype(sums[name].dtype)) for name in sums}, None


_link.defvjp(_link_forward, _link_backward)


@jax.custom_vjp
def settled(h: jax.Array, rows: Arrays, totals: Arrays) -> jax.Array:
    """h; the backward pass begins here, with `totals` as the sums so far of `rows`."""
    return h


def _settled_forward(h: jax.Array, rows: Arrays, totals: Arrays) -> Any:
    return h, totals


def _settled_backward(totals: Arrays, cotangent: jax.Array) -> Any:
    return cotangent, totals, None


settled.defvjp(_settled_forward, _settled_backward)


STACKS = ("own", "shared")


def of_stacks(names: Iterable[str]) -> list[str]:
    """Those of the names of a model's arrays that lie in a stack of layers of the decoder."""
    return [name for name in names if name.split(".", 1)[0] in STACKS]


def tallied(model: M, zeros: Arrays, totals: Arrays) -> M:
    """The model, whose derivative by `zeros` (arrays of its stacks, by name) is `totals` plus the gradients."""
    new: Any = jax.tree.map(lambda x: x, model)
    for name in STACKS:
        if (stack := getattr(new, name)) is not None:
            stack.tally = Tally(inside(name, zeros), inside(name, totals))
    return new

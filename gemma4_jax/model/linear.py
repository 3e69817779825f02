"""Weights and the linear map, with the one place where a weight can be quantised on its way to use."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.sharding import current_mesh

Dims = Mapping[str, int]
"""Ordered names and sizes of array dims; `gemma4_jax.sharding` maps the names to mesh axes."""


class Buffer(nnx.Variable):
    """State that checkpoints hold but no optimiser may touch (`layer_scalar`, clip bounds, scales of activations).

    A variable with the metadata `exact=True` keeps its dtype when a model is read in another one.
    """


class Grid(Protocol):
    """What a weight may be rounded to; `gemma4_jax.quant.grids` has the real ones. Must be hashable."""

    def fake_quant(self, w: jax.Array, axis: int, scale: jax.Array | None = None) -> jax.Array:
        """w rounded to the grid, blocks along `axis`, straight-through gradient; shape and dtype of w."""
        ...

    def encode(self, w: jax.Array, axis: int, scale: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """int8 codes of w's shape and scales, one per block along `axis`: found by the grid's rule, or given."""
        ...


class Rounding(Protocol):
    """How activations round; `gemma4_jax.quant.activations` has the real ones. Must be hashable. `static`: by given scales."""

    @property
    def static(self) -> bool: ...

    def enter(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Inputs [..., width] of a product."""
        ...

    def leave(self, y: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Its outputs."""
        ...


def variable_dims(*groups: Dims) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and shape of a variable whose dims are the groups one after the other."""
    names = tuple(name for group in groups for name in group)
    return names, tuple(size for group in groups for size in group.values())


class Weight(nnx.Module):
    """A matrix [*stack, *inputs, *outputs] that knows which dims are contracted.

    `role` is the name quantisation policies and adapters use for it. `grid`, `activations` and the scales (of blocks:
    learned; of inputs and outputs: calibrated) are set by a policy, never here.
    """

    def __init__(self, inputs: Dims, outputs: Dims, *, role: str, stack: Dims, rngs: nnx.Rngs, dtype: str):
        names, shape = variable_dims(stack, inputs, outputs)
        fan_in = math.prod(inputs.values())
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5, dims=names)
        self.n_in, self.n_out = len(inputs), len(outputs)
        self.role = role
        self.grid: Grid | None = None
        self.grid_scale: nnx.Param | None = nnx.data(None)
        self.activations: Rounding | None = None
        self.input_scale: Buffer | None = nnx.data(None)
        self.output_scale: Buffer | None = nnx.data(None)

    def rounded(self, w: jax.Array | None = None) -> jax.Array:
        """The weight, or `w` in its place, as the grid holds it, in its own shape and dtype; as it is without a grid.

        Leading dims (stack, experts) stay apart; blocks run along the flattened input dims.
        """
        if w is None:
            w = self.w[...]
        assert w is not None
        if self.grid is None:
            return w
        return self.grid.fake_quant(self.as_matrix(w), -2, value_of(self.grid_scale)).reshape(w.shape)

    def encoded(self) -> tuple[jax.Array, jax.Array]:
        """What a file holds of a weight with a grid: int8 codes [*stack, inputs, outputs] and scales [*stack, blocks, outputs].

        Decoded they are `rounded()`, bit for bit in float32.
        """
        assert self.grid is not None
        return self.grid.encode(self.as_matrix(self.w[...]), -2, value_of(self.grid_scale))

    def learn_scales(self) -> None:
        """Makes the scales of the grid a parameter, which starts where the grid's rule has them."""
        names, _ = self._stack()
        shapes: Any = jax.eval_shape(lambda module: module.encoded()[1], self)
        abstract = isinstance(self.w.get_value(), jax.ShapeDtypeStruct)
        start: Any = (
            jax.ShapeDtypeStruct(shapes.shape, jnp.float32) if abstract else self.encoded()[1].astype(jnp.float32)
        )
        self.grid_scale = nnx.Param(start, dims=(*names, "scale_blocks", "scale_outputs"), exact=True)

    def set_rounding(self, rounding: Rounding | None) -> None:
        """Rounds inputs and outputs from now on; static scales start at 0, not calibrated."""
        self.activations = rounding
        self.input_scale, self.output_scale = (self.scale_buffer(rounding) for _ in range(2))

    def scale_buffer(self, rounding: Rounding | None) -> Buffer | None:
        """A scale for each weight of the stack, float32 zeros, if the rounding needs given ones."""
        if rounding is None or not rounding.static:
            return None
        names, shape = self._stack()
        abstract = isinstance(self.w.get_value(), jax.ShapeDtypeStruct)
        zeros: Any = jax.ShapeDtypeStruct(shape, jnp.float32) if abstract else jnp.zeros(shape, jnp.float32)
        return Buffer(zeros, dims=names, exact=True)

    def _stack(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names and sizes of the dims in front of the weight's own."""
        w = self.w.get_value()
        count = w.ndim - self.n_in - self.n_out
        return self.w.dims[len(self.w.dims) - w.ndim :][:count], w.shape[:count]

    def as_matrix(self, w: jax.Array) -> jax.Array:
        """An array of the weight's shape as [*stack, inputs, outputs]."""
        cut = w.ndim - self.n_in - self.n_out
        return w.reshape(*w.shape[:cut], math.prod(w.shape[cut : cut + self.n_in]), -1)


M = TypeVar("M", bound=nnx.Module)


def multiplies_in(role: str, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike | None:
    """The dtype that weights of this role are cast to for use, in a model that computes in `dtype`; None: left as stored.

    The router computes in float32 whatever the model does.
    """
    return None if role == "router" else dtype


def holding(module: M, w: jax.Array) -> M:
    """The same module (a Weight, an Embedding) with `w` in place of its weight, used as it is: no grid."""
    new: Any = jax.tree.map(lambda x: x, module)
    new.w = new.w.replace(w)
    new.grid = new.grid_scale = None
    return new


def value_of(variable: nnx.Variable | None) -> jax.Array | None:
    """The array of a variable that may not be there."""
    return None if variable is None else variable.get_value()


class Linear(Weight):
    """y[..., *outputs] = x[..., *inputs] . w; computes in the dtype of x."""

    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.rounded().astype(x.dtype)
        lead, width = x.shape[: x.ndim - self.n_in], math.prod(w.shape[: self.n_in])
        # One plain matrix product; on a mesh batch and length may both be cut, and must not be folded into one dim.
        rows = lead if current_mesh() is not None else (math.prod(lead),)
        x = x.reshape(*rows, width)
        if self.activations is not None:
            x = self.activations.enter(x, value_of(self.input_scale))
        out = x @ w.reshape(width, -1)
        if self.activations is not None:
            out = self.activations.leave(out, value_of(self.output_scale))
        return out.reshape(*lead, *w.shape[self.n_in :])

"""Weights and the linear map, with the one place where a weight can be quantised or adapted on its way to use."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.kernels.order import not_before
from gemma4_jax.sharding import current_mesh

M = TypeVar("M", bound=nnx.Module)

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


class PackedGrid(Protocol):
    """How a weight that is stored as codes is read; `gemma4_jax.quant.packed.Packed` is the real one. Must be hashable."""

    def decode(self, packed: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
        """float32 values of packed codes [*stack, inputs, outputs] and scales [*stack, blocks, outputs]."""
        ...

    def dot(self, x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
        """x [..., inputs] times these values of one matrix, in x's dtype."""
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


class Adapter(nnx.Module):
    """scale * A B, what low-rank training adds to a weight: A [*stack, *inputs, rank], B [*stack, rank, *outputs], float32.

    A rests on a mesh as the weight's inputs do and B as its outputs do: they carry its dim names.
    """

    def __init__(self, a: Any, b: Any, *, scale: float, a_dims: tuple[str, ...], b_dims: tuple[str, ...]):
        self.a, self.b = nnx.Param(a, dims=a_dims, exact=True), nnx.Param(b, dims=b_dims, exact=True)
        self.scale = scale

    def product(self, n_in: int) -> jax.Array:
        """scale * A B in the weight's shape, float32. Dims are contracted as they lie: a reshape would move what is cut."""
        a, b = (x[...].astype(jnp.float32) for x in (self.a, self.b))
        lead = tuple(range(a.ndim - 1 - n_in))
        return jax.lax.dot_general(a, b, (((a.ndim - 1,), (len(lead),)), (lead, lead))) * self.scale

    def __call__(self, rows: jax.Array) -> jax.Array:
        """scale * (x A) B of rows x [..., inputs]: [..., outputs], in their dtype; of one weight, without a stack."""
        a, b = self.a[...].astype(rows.dtype), self.b[...].astype(rows.dtype)
        rank = a.shape[-1]
        return (rows @ a.reshape(-1, rank)) * jnp.asarray(self.scale, rows.dtype) @ b.reshape(rank, -1)


class Weight(nnx.Module):
    """A matrix [*stack, *inputs, *outputs] that knows which dims are contracted.

    `role` is the name quantisation policies and adapters use for it. `grid`, `activations` and the scales (of blocks:
    learned; of inputs and outputs: calibrated) are set by a policy, never here; `adapter` by `model.lora`; `packed` with its
    scales by `model.packing`: then `w` holds codes, several in a byte along the last input dim, and `packed_scale` is [*stack,
    blocks, *outputs].
    """

    adapts_beside = False
    """Whether the module multiplies with its adapter apart from the weight, where no grid wants their sum."""

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
        self.adapter: Adapter | None = nnx.data(None)
        self.packed: PackedGrid | None = None
        self.packed_scale: Buffer | None = nnx.data(None)

    @property
    def sums(self) -> bool:
        """Whether the adapter is added to the weight before use; it is else a product of its own, or there is none."""
        return self.adapter is not None and (self.grid is not None or not self.adapts_beside)

    @property
    def plain(self) -> bool:
        """Whether the weight is used as it is stored, but for its dtype."""
        return self.grid is None and self.packed is None and not self.sums

    def decoded(self, w: jax.Array | None = None, scale: jax.Array | None = None) -> jax.Array:
        """The weight without adapter and grid; of packed codes (or those given, with their scales) float32 values."""
        w = self.w.get_value() if w is None else w
        assert w is not None
        if self.packed is None:
            return w
        scale = value_of(self.packed_scale) if scale is None else scale
        assert scale is not None
        # Or XLA may decode all layers' codes before the loop over them.
        w, scale = jax.lax.optimization_barrier((w, scale))
        assert w is not None
        assert scale is not None
        lead, outputs = w.shape[: w.ndim - self.n_in - self.n_out], scale.shape[scale.ndim - self.n_out :]
        inputs = w.shape[len(lead) : len(lead) + self.n_in]
        values = self.packed.decode(self.as_matrix(w), scale.reshape(*lead, -1, math.prod(outputs)), -2)
        return values.reshape(*lead, *inputs[:-1], -1, *outputs)

    def summed(self) -> jax.Array:
        """The weight, decoded, and where `sums` with its adapter added: float32 in either case, else as stored."""
        if self.adapter is None or not self.sums:
            return self.decoded()
        return self.decoded().astype(jnp.float32) + self.adapter.product(self.n_in)

    def rounded(self, w: jax.Array | None = None) -> jax.Array:
        """`summed()`, or `w` in its place, as the grid holds it, in its own shape and dtype; as it is without a grid.

        Leading dims (stack, experts) stay apart; blocks run along the flattened input dims.
        """
        w = self.summed() if w is None else w
        if self.grid is None:
            return w
        return self.grid.fake_quant(self.as_matrix(w), -2, value_of(self.grid_scale)).reshape(w.shape)

    def encoded(self) -> tuple[jax.Array, jax.Array]:
        """What a file holds of a weight with a grid: int8 codes [*stack, inputs, outputs] and scales [*stack, blocks, outputs].

        Decoded they are `rounded()`, bit for bit in float32.
        """
        assert self.grid is not None
        return self.grid.encode(self.as_matrix(self.summed()), -2, value_of(self.grid_scale))

    def at(self, h: jax.Array) -> Self:
        """The same weight, for the place in a program where hidden states `h` are multiplied with it: codes wait for them."""
        if self.packed is None:
            return self
        new: Any = jax.tree.map(lambda x: x, self)
        new.w = new.w.replace(not_before(h, new.w.get_value()))
        return new

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


def multiplies_in(role: str, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike | None:
    """The dtype that weights of this role are cast to for use, in a model that computes in `dtype`; None: left as stored.

    The router computes in float32 whatever the model does.
    """
    return None if role == "router" else dtype


def holding(module: M, w: jax.Array) -> M:
    """The same module (a Weight, an Embedding) with `w` in place of its weight, used as it is: no grid.

    `w` has an adapter that was to be added in it; one that is a product of its own stays.
    """
    new: Any = jax.tree.map(lambda x: x, module)
    new.w = new.w.replace(w)
    if isinstance(module, Weight):
        new.adapter = None if module.sums else new.adapter
        new.packed = new.packed_scale = None
    new.grid = new.grid_scale = None
    return new


def value_of(variable: nnx.Variable | None) -> jax.Array | None:
    """The array of a variable that may not be there."""
    return None if variable is None else variable.get_value()


class Linear(Weight):
    """y[..., *outputs] = x[..., *inputs] . w; computes in the dtype of x."""

    adapts_beside = True

    def __call__(self, x: jax.Array) -> jax.Array:
        lead, outputs = x.shape[: x.ndim - self.n_in], self.w.get_value().shape[-self.n_out :]
        # One plain matrix product; on a mesh batch and length may both be cut, and must not be folded into one dim.
        rows = lead if current_mesh() is not None else (math.prod(lead),)
        x = x.reshape(*rows, math.prod(x.shape[len(lead) :]))
        if self.activations is not None:
            x = self.activations.enter(x, value_of(self.input_scale))
        out = self._product(x)
        if self.adapter is not None and not self.sums:
            out = out + self.adapter(x)
        if self.activations is not None:
            out = self.activations.leave(out, value_of(self.output_scale))
        return out.reshape(*lead, *outputs)

    def _product(self, x: jax.Array) -> jax.Array:
        """x [..., inputs] times the weight as a matrix, without an adapter that is a product of its own."""
        scale = value_of(self.packed_scale)
        if self.packed is None or scale is None or self.grid is not None or self.sums:
            return x @ self.as_matrix(self.rounded()).astype(x.dtype)
        codes = self.as_matrix(self.at(x).w.get_value())
        return self.packed.dot(x, codes, scale.reshape(-1, codes.shape[-1]))

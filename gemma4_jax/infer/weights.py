"""A model's weights as decoding reads them: layer by layer, rounded to their grids, in the dtype that multiplies fastest."""

import ctypes
import functools
import sys
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gemma4_jax.errors import UserError
from gemma4_jax.model import packing
from gemma4_jax.model.decode import Decoder, unroll
from gemma4_jax.model.embed import Embedding
from gemma4_jax.model.gathering import in_use
from gemma4_jax.model.linear import Weight, holding, multiplies_in
from gemma4_jax.model.parameters import modules
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant.policy import grid_names

T = TypeVar("T")
N = TypeVar("N", bound=nnx.Module)


def decoding_dtype(compute_dtype: str, platform: str) -> str:
    """What decoding computes in: float32 instead of bfloat16 on CPU.

    XLA's CPU backend reads bfloat16 weights of a matrix-vector product at 1.3 GB/s and float32 ones at 28 GB/s. Converting them in
    tiles on the way took 1.4 to 2 times as long as float32 (matrices of 2 to 19 million numbers), so float32 copies it is.
    """
    return "float32" if platform == "cpu" and compute_dtype == "bfloat16" else compute_dtype


class Towers(nnx.Module):
    """As much of a Transformer as sees and hears."""

    def __init__(self, model: Transformer, compute_dtype: str):
        self.vision, self.vision_projection = model.vision, model.vision_projection
        self.audio, self.audio_projection = model.audio, model.audio_projection
        self.compute_dtype = compute_dtype

    soft_tokens = Transformer.soft_tokens


def decoder_of(model: Transformer, *, consume: bool = False) -> Decoder:
    """The decoder of `parts_of`."""
    return parts_of(model, consume=consume)[0]


def parts_of(model: Transformer, *, consume: bool = False, packed: bool = False) -> tuple[Decoder, Towers | None]:
    """The unrolled model with every weight as decoding uses it: rounded to its grid, in `decoding_dtype`; and its towers.

    A step reads all weights, so neither is left to the step. The router stays as it is: it computes in float32. Tables that
    are read by rows, which are rounded and cast one by one, are the model's own arrays, not copies. With `consume` the model's
    weights are deleted as soon as there are others in their place, so that none but the one at hand exists twice: layers are
    cut out of their stacks first and cast one by one; the model must not be used any more. `packed`
    leaves linear maps and experts with a grid as codes, for each step to decode, and without a mesh the embeddings too: the same
    numbers, a seventh of the bytes of float32 at 4 bits.

    Raises UserError where `packed` finds no grid.
    """
    if packed:
        model = _packed(model, consume=consume)
    dtype = decoding_dtype(str(jnp.dtype(model.compute_dtype)), jax.default_backend())

    towers = placed(_ready(Towers(model, dtype), dtype, mine=consume)) if model.cfg.is_multimodal else None
    decoder = unroll(model, consume=consume)
    # The head first: it is the largest of all, and there is most room for two of it while the layers are still as they were.
    layers, decoder.layers = decoder.layers, nnx.List([])
    decoder = _ready(decoder, dtype, mine=consume)
    decoder.layers = nnx.List([_ready(layer, dtype, mine=True) for layer in layers])
    decoder = placed(in_use(decoder))
    decoder.compute_dtype = dtype
    _give_back_memory()
    return decoder, towers


def _ready(part: N, dtype: str, *, mine: bool) -> N:
    """A part with its weights as they are multiplied with; `mine`: those that they replace are deleted."""

    def ready(module):
        if not _is_weight(module) or module.packed is not None:
            return module
        if module.role == packing.LOOKED_UP or multiplies_in(module.role, dtype) is None:
            return module
        plain = module.plain if isinstance(module, Weight) else module.grid is None
        if plain and module.w.get_value().dtype == dtype:
            return module
        new = holding(module, _as_used(module, dtype))
        if mine:
            jax.block_until_ready(new)
            module.w.get_value().delete()
        return new

    return jax.tree.map(ready, part, is_leaf=_is_weight)


def _give_back_memory() -> None:
    """To the system what glibc keeps of the host arrays that were replaced: 0.4 GiB of E2B on a CPU. Without glibc nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _packed(model: Transformer, *, consume: bool) -> Transformer:
    weights = {path for path, module in modules(model) if isinstance(module, Weight)}
    weights |= packing.tables(model) if jax.sharding.get_mesh().empty else set()
    grids = {path: grid for path, grid in grid_names(model).items() if path in weights}
    if not grids and not packing.packed_names(model):
        raise UserError(
            "sample.packed keeps codes as codes, but the model has none: it was not trained on a grid. Round it first with "
            "export.policy, or leave sample.packed out."
        )
    return packing.packed(model, grids, consume=consume)


def placed(tree: T) -> T:
    """Arrays bound to the device they are on, or to the whole mesh that is set, without a copy.

    A program is compiled once for arrays that are bound to a device and once more for those that merely happen to be there, as
    fresh ones are; what a program returns is bound. So everything is bound from the start.
    """
    mesh = jax.sharding.get_mesh()

    def bound(x: jax.Array) -> jax.Array:
        if mesh.empty:
            return jax.device_put(x, next(iter(x.devices())))
        return x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(bound, tree)


def _is_weight(node: object) -> bool:
    return isinstance(node, Weight | Embedding)


@functools.partial(jax.jit, static_argnums=1)
def _as_used(module: Weight | Embedding, dtype: str) -> jax.Array:
    return module.head(dtype) if isinstance(module, Embedding) else module.rounded().astype(dtype)

"""Token embedding (tied with the output head) and the per-layer embeddings of E2B and E4B."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.kernels import slices, vocabulary
from gemma4_jax.model.linear import Buffer, Dims, Grid, Linear, PackedGrid, value_of, variable_dims
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.sharding import current_mesh

PART = 4096
"""Rows of a packed table that the head decodes at a time: 24 MiB of E2B's in float32."""


class Embedding(nnx.Module):
    """A table [V, width] read by rows, scaled by sqrt(scale_dim); the head multiplies by the same table.

    Quantisation blocks run along a row, so a lookup rounds only the rows it reads. On a mesh the table lies cut by rows and
    is never gathered (`kernels.vocabulary`). Where `model.packing` set `packed`, which is not on a mesh, `w` holds codes, several
    in a byte along a row, `packed_scale` is [V, blocks], a lookup decodes the rows it reads, and the head is `scores` alone.
    """

    def __init__(self, vocab: int, width: Dims, scale_dim: int, *, role: str, std: float, rngs: nnx.Rngs, dtype: str):
        names, shape = variable_dims({"vocab": vocab}, width)
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std, dims=names)
        self.scale_dim = scale_dim
        self.role = role
        self.grid: Grid | None = None
        self.grid_scale: nnx.Param | None = nnx.data(None)  # always None: a table keeps its grid's rule
        self.packed: PackedGrid | None = None
        self.packed_scale: Buffer | None = nnx.data(None)

    def lookup(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of int32 tokens [B, T] times sqrt(scale_dim) *rounded to dtype*, as bfloat16 checkpoints were trained."""
        if self.packed is not None:
            rows = self._decoded(lambda codes_or_scale: codes_or_scale[tokens_BT], dtype)
        elif current_mesh() is None:
            rows = vocabulary.narrowed(self._round(slices.rows(self.w[...], tokens_BT)), dtype)
        else:
            rows = vocabulary.lookup(self.w[...], tokens_BT, dtype, self._round)
        return rows * jnp.asarray(self.scale_dim**0.5, dtype)

    def rounded(self) -> jax.Array:
        """The whole table as its grid holds it."""
        return self._round(self.w[...])

    def encoded(self) -> tuple[jax.Array, jax.Array]:
        """What a file holds of a table with a grid: int8 codes [V, width] and scales [V, blocks]; decoded, `rounded()`."""
        assert self.grid is not None
        return self.grid.encode(self.w[...], -1)

    def head(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The rounded table in `dtype`, as hidden states are multiplied by it."""
        if self.grid is None or current_mesh() is None:
            return self.rounded().astype(dtype)
        return vocabulary.rounded(self.w[...], dtype, self._round)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V]: hidden states [..., W] times the table; of codes, PART rows are decoded at a time."""
        if current_mesh() is not None:
            return vocabulary.logits(hidden, self.head(hidden.dtype))
        if self.packed is None:
            return jnp.einsum("...D,VD->...V", hidden, self.head(hidden.dtype), preferred_element_type=jnp.float32)
        rows = self.w[...].shape[0]
        part = min(PART, rows)

        def add(index, out):
            start = index * part  # the last part begins within the one before, as slices are moved to where they fit
            table = self._decoded(lambda x: jax.lax.dynamic_slice_in_dim(x, start, part), hidden.dtype)
            found = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(out, found, start, -1)

        return jax.lax.fori_loop(0, -(-rows // part), add, jnp.zeros((*hidden.shape[:-1], rows), jnp.float32))

    def _decoded(self, of: Callable[[jax.Array], jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of a packed table, whose codes and scales `of` takes from all."""
        scale = value_of(self.packed_scale)
        assert self.packed is not None
        assert scale is not None
        return vocabulary.narrowed(self.packed.decode(of(self.w[...]), of(scale), -1), dtype)

    def _round(self, rows: jax.Array) -> jax.Array:
        return rows if self.grid is None else self.grid.fake_quant(rows, axis=-1)


class PerLayerInputs(nnx.Module):
    """A small vector per token and layer: (token part + context part) / sqrt 2.

    The token part is a table row times sqrt(P); the context part is RMSNorm(projection of the embedding / sqrt(D)).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype: str):
        width = cfg.hidden_size_per_layer_input
        per_layer = {"layers": cfg.num_hidden_layers, "per_layer": width}
        self.table = Embedding(
            cfg.vocab_size_per_layer_input or cfg.vocab_size,
            {"layers_per_layer": cfg.num_hidden_layers * width},
            width,
            role="per_layer_embedding",
            std=width**-0.5,
            rngs=rngs,
            dtype=dtype,
        )
        embed = {"embed": cfg.hidden_size}
        self.projection = Linear(embed, per_layer, role="per_layer_projection", stack={}, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm({"per_layer": width}, cfg.rms_norm_eps, stack={}, dtype=dtype)

    def __call__(self, tokens_BT: jax.Array, embedded_BTD: jax.Array) -> jax.Array:
        """[L, B, T, P], layers first so that a scan over layers slices it."""
        context = self.norm(self.projection(embedded_BTD) * embedded_BTD.shape[-1] ** -0.5)
        token = self.table.lookup(tokens_BT, embedded_BTD.dtype).reshape(context.shape)
        return jnp.moveaxis((context + token) * 2.0**-0.5, 2, 0)

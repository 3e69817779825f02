"""Reading and writing tokens with a cache: the same layers, unrolled.

A scan over layers with the cache as its input and output makes XLA hold a second cache (1.61 GB of temporaries for a
1.61 GB cache); unrolled layers with a donated tuple of caches need none. A prompt is read in chunks, block of layers by block
of layers: all blocks of a stack are one compiled program, and the weights exist once, unrolled.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.config import LayerKind, ModelConfig
from gemma4_jax.kernels.cached import Codes, Fresh
from gemma4_jax.kernels.order import never
from gemma4_jax.model.embed import Embedding, PerLayerInputs
from gemma4_jax.model.kv import (
    KV,
    Cache,
    Chunk,
    extend_rows,
    halo,
    producers,
    slot_of,
    write,
    write_positions,
    write_rows,
)
from gemma4_jax.model.layer import Layer
from gemma4_jax.model.layouts import CacheFormat, View, decoded, encoded
from gemma4_jax.model.multimodal import SoftTokens
from gemma4_jax.model.norm import RMSNorm
from gemma4_jax.model.transformer import Transformer, places_of

Stored = dict[str, Codes]
PLAIN = CacheFormat()


class Decoder(nnx.Module):
    """A Transformer with its layers apart; made once per model by `unroll`."""

    def __init__(self, model: Transformer, layers: list[Layer]):
        self.embed: Embedding = model.embed
        self.per_layer: PerLayerInputs | None = model.per_layer
        self.layers = nnx.List(layers)
        self.final_norm: RMSNorm = model.final_norm
        self.cfg: ModelConfig = model.cfg
        self.compute_dtype = model.compute_dtype

    places = Transformer.places
    embed_tokens = Transformer.embed_tokens
    logits = Transformer.logits

    def step(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache,
        cache_format: CacheFormat = PLAIN,
        rows: jax.Array | np.ndarray | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of the next tokens, and the cache with them in it.

        Tokens with position -1 are idle: nothing is written for them. `rows` [B] are the cache's rows that the tokens
        belong to; None: all, in order. T may not exceed the `ahead` the cache was made for, or what is written
        overtakes keys that the next step still sees, should some of these tokens be taken back.
        """
        rows = None if rows is None else jnp.asarray(rows)
        seen = cache.positions if rows is None else {kind: where[rows] for kind, where in cache.positions.items()}
        places = self.places(positions_BT)
        h, per_layer = self.embed_tokens(tokens_BT, self.per_layer)
        new: list[Stored] = []
        source_layer = producers(self.cfg)

        def view(layer: Layer, index: int) -> View:
            heads_first = {name: Codes(*map(_heads_first, codes)) for name, codes in new[index].items()}
            fresh = Fresh(heads_first, positions_BT)
            kind = layer.attention.kind
            return view_of(layer, self.cfg, cache_format, cache.layers[index], seen[kind], rows, fresh)

        for index, layer in enumerate(self.layers):

            def keep(k, v, index=index, layer=layer):
                new.append(encoded(self.cfg, layer.attention.kind, cache_format, k, v))
                return view(layer, index)

            shares = layer.attention.k is None
            source = view(layer, source_layer[layer.attention.kind]) if shares else keep
            h, _, _ = layer(h, None if per_layer is None else per_layer[index], places, source)
        h = self.final_norm(h)
        # XLA must see that all reading comes before any writing, or it writes to a copy of every ring: so the slots depend on
        # what was read, by a comparison that never holds.
        slot = {
            kind: jnp.where(never(h), where.shape[1], slot_of(positions_BT, where.shape[1]))
            for kind, where in cache.positions.items()
        }
        positions: dict[LayerKind, jax.Array] = {
            kind: write_positions(where, slot[kind], positions_BT, rows) for kind, where in cache.positions.items()
        }
        written = (
            write(old, slot[layer.attention.kind], one, rows)
            for old, one, layer in zip(cache.layers, new, self.layers[: len(new)], strict=True)
        )
        return h, Cache(tuple(written), positions)


def _heads_first(x_BTK: Any) -> Any:
    return None if x_BTK is None else jnp.moveaxis(x_BTK, 1, 2)


def view_of(
    layer: Layer,
    cfg: ModelConfig,
    cache_format: CacheFormat,
    parts: Stored,
    positions_PS: jax.Array,
    rows: jax.Array | None = None,
    fresh: Fresh | None = None,
) -> View:
    """What the queries of a layer see of a cache."""
    kind = layer.attention.kind
    layout = cache_format.of_kind(cfg, kind)
    norm = layer.attention.k_norm
    scale = None if layout == "plain" or norm is None else norm.scale[...]
    return View(parts, positions_PS, rows, scale, fresh, cfg, kind, layout)


def fill_block(
    layers: Sequence[Layer],
    stored: Sequence[Stored],
    h_PTD: jax.Array,
    per_layer_LPTp: jax.Array | None,
    before: dict[LayerKind, jax.Array],
    chunk: Chunk,
    cfg: ModelConfig,
    cache_format: CacheFormat,
    soft: SoftTokens | None = None,
) -> tuple[jax.Array, tuple[Stored, ...]]:
    """A chunk through neighbouring layers that own keys and values: the residual stream, and what they store now.

    Sliding layers look at the last `window` tokens before the chunk and the chunk itself, with the kernel of training; full
    layers at the cache the chunk was written to. Memory grows with chunk x window, and with the blocks of `kernels/cached.py`.

    Args:
      layers, stored: as many; what each stores, of all rows.
      h_PTD: residual stream.
      per_layer_LPTp: per-layer inputs of these layers, or None.
      before: positions in the chunk's rows before the chunk (`begin_rows`).
      chunk: what is read.
      cfg, cache_format: of the model and the cache.
      soft: of the chunk's tokens, where it has media; pictures are whole in it (`media.pieces.uncut`).
    """
    positions = chunk.positions
    places = places_of(cfg, positions, soft=soft)
    after = extend_rows(before, chunk)
    written: list[Stored] = []
    for index, layer in enumerate(layers):
        kind = layer.attention.kind

        def keep(k, v, index=index, layer=layer, kind: LayerKind = kind):
            new = encoded(cfg, kind, cache_format, k, v)
            window = cfg.window(kind)
            written.append(write_rows(stored[index], chunk, new, ordered=window is None))
            if window is None:
                return view_of(layer, cfg, cache_format, written[-1], after[kind], _inside(chunk.rows, stored[index]))
            old, where = halo(stored[index], before[kind], chunk, window)

            def both(name: str) -> jax.Array:
                return jnp.concatenate([decoded(old[name], k.dtype), decoded(new[name], k.dtype)], axis=1)

            return KV(both("k"), both("v"), jnp.concatenate([where, positions], axis=1), before=where.shape[1])

        h_PTD, _, _ = layer(h_PTD, None if per_layer_LPTp is None else per_layer_LPTp[index], places, keep)
    return h_PTD, tuple(written)


def last_through(
    layers: Sequence[Layer],
    sources: dict[LayerKind, Stored],
    h_PD: jax.Array,
    per_layer_LPp: jax.Array | None,
    after: dict[LayerKind, jax.Array],
    position_P: jax.Array,
    rows: jax.Array,
    cfg: ModelConfig,
    cache_format: CacheFormat,
) -> jax.Array:
    """The last token of each prompt through the layers that share keys and values: [P, D].

    They store nothing, so no other token of a prompt has to pass them: of E2B's prefill more than half.
    """
    places = places_of(cfg, position_P[:, None])
    h = h_PD[:, None]
    for index, layer in enumerate(layers):
        kind = layer.attention.kind
        source = view_of(layer, cfg, cache_format, sources[kind], after[kind], _inside(rows, sources[kind]))
        h, _, _ = layer(h, None if per_layer_LPp is None else per_layer_LPp[index][:, None], places, source)
    return h[:, 0]


def _inside(rows: jax.Array, stored: Stored) -> jax.Array:
    """Rows to read: an existing one for pieces that go nowhere."""
    return jnp.minimum(rows, stored["v"].values.shape[0] - 1)


def unroll(model: Transformer, *, consume: bool = False) -> Decoder:
    """The layers of both stacks as a list, each with its own slice of the stacked parameters.

    With `consume` every stacked parameter is deleted once its slices exist: one of them at a time exists twice, not all.
    """
    layers: list[Layer] = []
    for stack in (model.own, model.shared):
        if stack is None:
            continue
        blocks, sliding = range(stack.plan.blocks), range(stack.plan.sliding)
        parts = [_slices(stack.sliding, [(b, i) for b in blocks for i in sliding], consume)]
        parts.append(_slices(stack.full, [(b,) for b in blocks], consume))
        for block in blocks:
            layers += [*parts[0][block * len(sliding) : (block + 1) * len(sliding)], parts[1][block]]
    return Decoder(model, layers)


def _slices(stacked: Layer, places: Sequence[tuple[int, ...]], consume: bool) -> list[Layer]:
    leaves, tree = jax.tree.flatten(stacked)
    columns = []
    for x in leaves:
        columns.append([x[place] for place in places])
        if consume:
            jax.block_until_ready(columns[-1])
            x.delete()
    return [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]

"""How the engine's cache is stored, and what that costs: bytes of a token and of a request, and how many requests fit."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.kv import empty_cache, owner_kinds, slot_bytes, slots, total_bytes
from gemma4_jax.model.layouts import CacheFormat, Layout, Storage
from gemma4_jax.options import option
from gemma4_jax.tables import table

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How keys and values are kept while answers are written."""

    layout: Layout | None = option(
        None, "of full layers whose values are their keys (26B, 31B); none: unified there, plain elsewhere"
    )
    storage: Storage = option("compute", "numbers in the compute dtype, or in 8 bits with a scale per token and head")
    prefix_mb: int = option(
        0, "megabytes for the beginnings of earlier prompts, so that the same text is not read twice"
    )

    def __post_init__(self) -> None:
        if self.prefix_mb < 0:
            raise UserError(f"cache.prefix_mb is 0 (nothing is kept) or more, got {self.prefix_mb}.")

    def format(self, cfg: ModelConfig) -> CacheFormat:
        """What the cache of this model stores. Raises UserError for a layout it cannot have."""
        return CacheFormat.of(cfg, self.layout, self.storage)


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of one request's cache: what sliding and full layers store, and the positions of slots."""

    sliding: int
    full: int
    positions: int

    @property
    def total(self) -> int:
        return self.sliding + self.full + self.positions


def request_bytes(cfg: ModelConfig, length: int, dtype: str, cache_format: CacheFormat) -> CacheBytes:
    """What a request of `length` tokens, prompt and answer, takes."""
    itemsize = jnp.dtype(dtype).itemsize
    of = {
        kind: slots(cfg, kind, length) * slot_bytes(cfg, kind, itemsize, cache_format) for kind in ("sliding", "full")
    }
    layers = {kind: sum(owner == kind for owner in owner_kinds(cfg)) for kind in of}
    positions = 4 * (slots(cfg, "sliding", length) + slots(cfg, "full", length))
    return CacheBytes(layers["sliding"] * of["sliding"], layers["full"] * of["full"], positions)


def token_bytes(cfg: ModelConfig, dtype: str, cache_format: CacheFormat, where: Literal["within", "beyond"]) -> int:
    """Bytes that one more token takes, within the sliding window or beyond it, where only full layers grow."""
    window = cfg.sliding_window
    length = 1 if where == "within" else window + 1
    more = request_bytes(cfg, length, dtype, cache_format).total
    return more - request_bytes(cfg, length - 1, dtype, cache_format).total


def allocated_bytes(cfg: ModelConfig, length: int, dtype: str, cache_format: CacheFormat) -> int:
    """The same as `request_bytes` from the shapes of the arrays that would be allocated."""
    return total_bytes(jax.eval_shape(lambda: empty_cache(cfg, 1, length, dtype, cache_format=cache_format)))


def fits(cfg: ModelConfig, memory: int, length: int, dtype: str, cache_format: CacheFormat) -> int:
    """How many requests of `length` tokens have room for their caches in `memory` bytes."""
    return memory // request_bytes(cfg, length, dtype, cache_format).total


def report(cfg: ModelConfig, memory: int, dtype: str, cache_format: CacheFormat, lengths: tuple[int, ...] = ()) -> str:
    """A table: what requests of several lengths take, and how many fit into `memory` bytes."""
    context = cfg.max_position_embeddings
    lengths = lengths or tuple(n for n in (2048, 8192, 32768, 131072, 262144) if n <= context)
    rows = []
    for length in lengths:
        one = request_bytes(cfg, length, dtype, cache_format)
        sizes = (f"{part / GIB:.3f}" for part in (one.sliding, one.full, one.total))
        rows.append((f"{length:,}", *sizes, memory // one.total))
    layout = cache_format.of_kind(cfg, "full")
    within, beyond = (token_bytes(cfg, dtype, cache_format, where) for where in ("within", "beyond"))
    stored = dtype if cache_format.storage == "compute" else cache_format.storage
    head = f"cache: {layout} full layers in {stored}; a token takes {within:,} bytes, beyond the window {beyond:,}"
    header = ("tokens", "sliding GiB", "full GiB", "GiB", f"fit into {memory / GIB:.1f} GiB")
    return f"{head}\n{table(header, rows)}"

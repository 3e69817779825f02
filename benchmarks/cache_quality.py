"""What a cache in 8 bits costs in quality: `python -m benchmarks.cache_quality CHECKPOINT DATA.jsonl [--rows 16]`.

Rows are read token by token through the cache, in each layout and storage; against the plain cache in float32: mean KL of the next
token's distribution, how often the likeliest token is the same, and the loss.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.checkpoint.load import load
from gemma4_jax.errors import UserError
from gemma4_jax.model.decode import Decoder, unroll
from gemma4_jax.model.kv import empty_cache
from gemma4_jax.model.layouts import CacheFormat, Layout, Storage
from gemma4_jax.processor import Processor
from gemma4_jax.tables import table


@functools.partial(jax.jit, static_argnames="cache_format")
def next_token(decoder: Decoder, tokens_BT: jax.Array, lengths_B: jax.Array, *, cache_format: CacheFormat) -> jax.Array:
    """Log-probabilities float32 [T, B, V] of what follows each token, every token read through the cache."""
    batch, length = tokens_BT.shape
    cache = empty_cache(decoder.cfg, batch, length, decoder.compute_dtype, cache_format=cache_format)

    def step(cache, at):
        positions = jnp.where(at < lengths_B, at, -1)[:, None]
        token = jax.lax.dynamic_slice_in_dim(tokens_BT, at, 1, 1)
        hidden, cache = decoder.step(token, positions, cache, cache_format)
        return cache, jax.nn.log_softmax(decoder.logits(hidden[:, 0]))

    return jax.lax.scan(step, cache, jnp.arange(length, dtype=jnp.int32))[1]


def losses(
    decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, formats: list[CacheFormat]
) -> list[tuple[float, ...]]:
    """(KL, share of same likeliest tokens, loss) for each format, the first being what others are held against."""
    want = None
    rows = []
    for form in formats:
        found = np.asarray(next_token(decoder, jnp.asarray(tokens), jnp.asarray(lengths), cache_format=form))
        want = found if want is None else want
        real = np.arange(tokens.shape[1] - 1)[:, None] < lengths[None] - 1
        ours, exact = found[:-1][real], want[:-1][real]
        kl = float((np.exp(exact) * (exact - ours)).sum(-1).mean())
        same = float((exact.argmax(-1) == ours.argmax(-1)).mean())
        loss = -float(np.take_along_axis(found[:-1], tokens.T[1:, :, None], -1)[..., 0][real].mean())
        rows.append((kl, same, loss))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_quality")
    parser.add_argument("checkpoint")
    parser.add_argument("data", help='JSONL with {"messages"}')
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    try:
        model, processor = load(options.checkpoint), Processor.load(options.checkpoint)
        chats = [json.loads(line) for line in Path(options.data).read_text().splitlines()[: options.rows]]
        rows = [processor.encode(chat["messages"], chat.get("tools")).tokens for chat in chats]
    except (UserError, OSError) as error:
        sys.exit(f"benchmarks.cache_quality: {error}")
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: ids.size] = ids
    layouts: tuple[Layout, ...] = ("plain", "unified", "rotate_on_read") if model.cfg.attention_k_eq_v else ("plain",)
    storages: tuple[Storage, ...] = ("compute", "int8", "fp8")
    formats = [CacheFormat(a, b) for a in layouts for b in storages]
    print(f"{lengths.sum()} tokens in {len(rows)} rows")
    found = zip(formats, losses(unroll(model), tokens, lengths, formats), strict=True)
    lines = [(form.layout, form.storage, f"{kl:.2e}", f"{top:.2%}", f"{loss:.4f}") for form, (kl, top, loss) in found]
    print(table(("layout", "storage", "KL", "same top token", "loss"), lines))


if __name__ == "__main__":
    main()

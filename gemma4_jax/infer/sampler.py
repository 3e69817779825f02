"""Logits become tokens: greedy, or drawn after temperature, top-k, top-p and min-p, each row by its own rule and key.

Nothing is ever sorted. Up to FEW candidates come from one `top_k`; any other rule is a threshold on the logits, found by
bisection over the bits of a float32, and the draw from what is left takes two steps, a block of the vocabulary and a token in
it. With 262,144 logits on one CPU core (ms a row): argmax 0.2 where `jnp.argmax` takes 4, 64 candidates 0.4, thresholds 2 to
9 where a sort takes 115, the draw 0.3 where noise on every logit takes 10.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gemma4_jax.errors import UserError

FEW = 64  # the published top_k
BLOCK = 512
GREEDIEST = 1e-6  # lower temperatures than this overflow and draw the same


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one request draws its tokens; UserError for a value that has no meaning.

    temperature 0 takes the largest logit. Otherwise logits are divided by it, cut to the `top_k` largest (0: all), then to the
    smallest set of most probable tokens that holds `top_p` of what is left, then to those at least `min_p` times as probable
    as the first. Tokens that tie with the last one kept may be kept too.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is 0 (greedy) or a positive number, got {self.temperature}.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k is a whole number of tokens to choose from, or 0 for all, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p lies above 0 and up to 1 (1 keeps every token), got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p lies in 0 (keeps every token) to 1, got {self.min_p}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """One rule per row: float32 temperature, int32 top_k, float32 top_p and min_p, all [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array

    @classmethod
    def of(cls, rules: Sequence[Rule]) -> "Rules":
        """The rules side by side."""
        return cls(
            jnp.asarray([rule.temperature for rule in rules], jnp.float32),
            jnp.asarray([min(rule.top_k, 2**31 - 1) for rule in rules], jnp.int32),
            jnp.asarray([rule.top_p for rule in rules], jnp.float32),
            jnp.asarray([rule.min_p for rule in rules], jnp.float32),
        )


def choose(
    logits_BV: jax.Array, rules: Rules, keys_B: jax.Array, allowed: Callable[[jax.Array], jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B] and their float32 log-probabilities [B] under the logits as they are, before any rule.

    A row's token depends on its own logits, rule and key only; work that no row asks for is not done.

    Args:
      logits_BV: float32 [B, V].
      rules: one a row.
      keys_B: typed random keys, one a row, used once.
      allowed: makes logits -inf where a token may not be chosen; the log-probabilities do not know of it.
    """
    raw_BV, logits_BV = logits_BV, logits_BV if allowed is None else allowed(logits_BV)
    rows, vocab = logits_BV.shape
    temperature, top_k = rules.temperature, rules.top_k
    greedy = temperature <= 0
    few = ~greedy & (top_k > 0) & (top_k <= FEW)
    # The random numbers of every method are drawn in one place: they are most of what compiling this costs.
    shape = rows, max(FEW, BLOCK + _blocks(vocab))
    noise = jax.lax.cond(greedy.all(), lambda: jnp.zeros(shape, jnp.float32), lambda: _gumbel(keys_B, shape[1]))
    scaled = lambda: logits_BV / jnp.maximum(temperature, GREEDIEST)[:, None]  # noqa: E731
    methods = (
        (greedy, lambda: largest(logits_BV)),
        (few, lambda: _among_few(scaled(), rules, noise)),
        (~greedy & ~few, lambda: _among_all(scaled(), rules, noise)),
    )
    token = jnp.zeros(rows, jnp.int32)
    for mine, method in methods:
        token = jax.lax.cond(
            mine.any(),
            lambda mine=mine, method=method, token=token: jnp.where(mine, method(), token),
            lambda token=token: token,
        )
    chosen = jnp.take_along_axis(raw_BV, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(raw_BV, axis=-1)


def largest(x_BV: jax.Array) -> jax.Array:
    """The first index of each row's maximum, int32 [B]: two plain reductions, which XLA vectorises on CPU, unlike argmax."""
    index = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    is_top = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_top, index, x_BV.shape[1] - 1), axis=-1)


def _among_few(x_BV: jax.Array, rules: Rules, noise: jax.Array) -> jax.Array:
    """A draw for rows with 1 <= top_k <= FEW."""
    top, index = jax.lax.top_k(x_BV, min(FEW, x_BV.shape[1]))  # largest first
    rank = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
    top = jnp.where(rank < rules.top_k[:, None], top, -jnp.inf)
    p = jax.nn.softmax(top, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep = (rank == 0) | ((before < rules.top_p[:, None]) & (top >= _min_p_bound(top[:, :1], rules)))
    place = largest(jnp.where(keep, top, -jnp.inf) + noise[:, : top.shape[1]])
    return jnp.take_along_axis(index, place[:, None], axis=1)[:, 0].astype(jnp.int32)


def _among_all(x_BV: jax.Array, rules: Rules, noise: jax.Array) -> jax.Array:
    """A draw for any rule."""
    top_k, top_p = rules.top_k, rules.top_p
    top = jnp.max(x_BV, axis=-1, keepdims=True)
    weight = jnp.exp(x_BV - top)

    def by_top_k(x):
        bound = _bound(x, jnp.ones_like(x), jnp.minimum(top_k, x.shape[1]).astype(jnp.float32))
        return jnp.where((top_k[:, None] == 0) | (x >= bound), x, -jnp.inf)

    def by_top_p(x):
        left = jnp.where(x > -jnp.inf, weight, 0.0)
        bound = _bound(x, left, top_p * jnp.sum(left, axis=-1))
        return jnp.where((top_p[:, None] >= 1) | (x >= bound), x, -jnp.inf)

    x = jax.lax.cond((top_k > 0).any(), by_top_k, lambda x: x, x_BV)
    x = jax.lax.cond((top_p < 1).any(), by_top_p, lambda x: x, x)
    x = jnp.where((x >= _min_p_bound(top, rules)) | (x == top), x, -jnp.inf)
    return _draw_by_blocks(x, noise)


def _min_p_bound(top_B1: jax.Array, rules: Rules) -> jax.Array:
    """The smallest logit min_p keeps, [B, 1]; minus infinity for 0."""
    return top_B1 + jnp.log(rules.min_p)[:, None]


def _bound(x_BV: jax.Array, weight_BV: jax.Array, enough_B: jax.Array) -> jax.Array:
    """The largest value [B, 1] such that the weights of all x at or above it sum to `enough`, or the smallest float.

    Floats read as integers keep their order once the negative ones are flipped, so 32 halvings find it exactly.
    """

    def flip(bits):
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    order = flip(jax.lax.bitcast_convert_type(x_BV, jnp.int32))

    def halve(_, between):
        low, high = between
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
        holds = jnp.sum(jnp.where(order >= middle[:, None], weight_BV, 0.0), axis=-1) >= enough_B
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    infinity = jnp.int32(0x7F800000)
    rows = x_BV.shape[:1]
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.full(rows, flip(-jnp.int32(0x800000))), jnp.full(rows, infinity)))
    return jax.lax.bitcast_convert_type(flip(low), jnp.float32)[:, None]


def _blocks(vocab: int) -> int:
    return -(-vocab // BLOCK)


def _gumbel(keys_B: jax.Array, count: int) -> jax.Array:
    """Noise [B, count]: the largest of logits plus noise is a draw from their softmax."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys_B)


def _draw_by_blocks(x_BV: jax.Array, noise: jax.Array) -> jax.Array:
    """A draw from softmax(x) with BLOCK + V / BLOCK random numbers: first a block, by its total, then a token of it."""
    rows, vocab = x_BV.shape
    padded = jnp.pad(x_BV, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, BLOCK)
    block = largest(jax.nn.logsumexp(blocks, axis=-1) + noise[:, BLOCK : BLOCK + blocks.shape[1]])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + largest(inside + noise[:, :BLOCK])

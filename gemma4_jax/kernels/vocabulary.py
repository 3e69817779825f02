"""The vocabulary's tables on a mesh, cut by rows over many devices: lookup, its gradient, and the head's logits.

A table never moves. A token's row does: devices ask for the distinct ids of their tokens, once each, by all-to-all, in
two steps. The id goes to a middleman, id mod n of the n devices, and distinct ids of all who asked him go on to the
owner: in text most ids are small and lie with one owner, who would send nearly every row n times otherwise. The
gradient takes the same way back, summed at each stop.

Rows sent per token and device, all padding counted, 8192 tokens a device in parts of 2048, mixed text and code: 1.5 on 8
devices, 1.75 on 16, 2.5 on 64 (asking owners directly: 2.0, 3.25, 8.25). Looking every token up everywhere and
reduce-scattering the result takes 7, 15 and 63. Ids drawn uniformly, which is not text, take 4.4 to 5.6.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma4_jax.errors import UserError
from gemma4_jax.sharding import VOCABULARY, activation_spec, axes_in, current_mesh, size_of

# Tokens whose rows together take at most this much are exchanged at a time. Larger parts have fewer distinct ids in all.
# Temporaries of a lookup and its gradient, 8192 tokens of 8960 numbers on 16 devices: 72 MiB on v5e and v6e, 141 MiB on tpu7x.
PART_BYTES = 64 * 2**20
# All rows of a step of decoding take less than this: one reduce-scatter is over sooner than the exchange's loops.
FEW_BYTES = 4 * 2**20

Rounding = Callable[[jax.Array], jax.Array] | None


class Cut(NamedTuple):
    """How tokens and a table lie on a mesh: the axes of `vocabulary` cut the table, those of `copies` the tokens alone.

    Along `shared`, a part of `vocabulary`, tokens are cut too; along `idle`, the other part, they are whole. Along `copies`
    tables are whole and their gradients are summed. Without a mesh nothing is cut.
    """

    mesh: jax.sharding.AbstractMesh | None = None
    tokens: PartitionSpec = PartitionSpec()
    vocabulary: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        return 1 if self.mesh is None else size_of(self.mesh, axes)

    @property
    def everyone(self) -> tuple[str, ...]:
        return self.copies + self.vocabulary

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocabulary or None, None)

    @property
    def vectors(self) -> PartitionSpec:
        """Of one vector per token."""
        return PartitionSpec(*self.tokens, None)

    def first_row(self, rows: int) -> jax.Array | int:
        """The vocabulary's index of this device's first row, of the `rows` it has."""
        return jax.lax.axis_index(self.vocabulary) * rows if self.vocabulary else 0


def cut_of(tokens_shape: tuple[int, ...], vocabulary: int) -> Cut:
    """The cut of tokens [B], [B, T] and a table of `vocabulary` rows on the current mesh; UserError if it does not divide."""
    mesh = current_mesh()
    if mesh is None:
        return Cut()
    axes = tuple(axis for axis in VOCABULARY if mesh.shape[axis] > 1)
    if vocabulary % size_of(mesh, axes):
        listed = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
        raise UserError(
            f"The vocabulary's {vocabulary} rows must divide evenly over the mesh axes {listed}, {size_of(mesh, axes)} devices; "
            "make these smaller in config.mesh, and data larger."
        )
    tokens = activation_spec(mesh, ("batch", "length")[: len(tokens_shape)], tokens_shape)
    tokens = PartitionSpec(*tokens, *[None] * (len(tokens_shape) - len(tokens)))
    used = [axis for entry in tokens for axis in axes_in(entry)]
    shared, idle = tuple(a for a in axes if a in used), tuple(a for a in axes if a not in used)
    return Cut(mesh, tokens, axes, shared, idle, tuple(a for a in used if a not in axes))


def island(cut: Cut, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """f on each device's own part; f itself without a mesh."""
    if cut.mesh is None:
        return f
    # Sums over devices are made by hand in what is wrapped here, so what is whole along which axis is not checked.
    return jax.shard_map(f, mesh=cut.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def lookup(
    table_VW: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike, rounding: Rounding = None
) -> jax.Array:
    """Rows [B, T, W] of the table in `dtype`, in which they travel; exact, since nothing is added to a row on its way.

    tokens_BT: int32 ids. `rounding`: what the owner does to rows [M, W] first; the gradient passes straight through it. The
    table's gradient is summed in float32 and made once; sums of equal ids travel in `dtype`. Needs a mesh.
    """
    vocabulary, width = table_VW.shape
    cut, dtype = cut_of(tokens_BT.shape, vocabulary), jnp.dtype(dtype)
    rows, tokens = vocabulary // cut.size(cut.vocabulary), tokens_BT.size // cut.size(cut.copies)
    few = not cut.vocabulary or tokens * width * dtype.itemsize <= FEW_BYTES

    def forward(table, ids):
        def own(local_M):
            found = table[jnp.clip(local_M, 0, rows - 1)]
            return narrowed(found if rounding is None else rounding(found), dtype)

        flat = jnp.clip(ids.reshape(-1), 0, vocabulary - 1)
        found = (_look_everywhere if few else _exchange)(cut, rows, flat, own, width, dtype)
        return found.reshape(*ids.shape, width)

    def backward(ids, d):
        def add(d_table, local_M, d_MW):
            return d_table.at[local_M].add(d_MW.astype(jnp.float32), mode="drop")

        flat, d = jnp.clip(ids.reshape(-1), 0, vocabulary - 1), d.reshape(-1, width)
        d_table = jnp.zeros((rows, width), jnp.float32)
        d_table = (_add_everywhere if few else _exchange_back)(cut, rows, flat, d, add, d_table)
        return total(d_table, cut.copies).astype(table_VW.dtype)

    @jax.custom_vjp
    def find(table, tokens):
        return island(cut, forward, (cut.table, cut.tokens), cut.vectors)(table, tokens)

    def find_back(tokens, d):
        return island(cut, backward, (cut.tokens, cut.vectors), cut.table)(tokens, d), None

    find.defvjp(lambda table, tokens: (find(table, tokens), tokens), find_back)
    return find(table_VW, tokens_BT)


def narrowed(rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a table in `dtype`. They are rounded first: XLA for TPUs moves a plain conversion to bfloat16 up to what the rows
    were read from, and converts the whole table (280 MiB more for a 16th of E2B's per-layer table). Sums over devices likewise."""
    if jnp.finfo(dtype).bits < jnp.finfo(rows.dtype).bits:
        rows = jax.lax.reduce_precision(rows, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return rows.astype(dtype)


def rounded(table_VW: jax.Array, dtype: jax.typing.DTypeLike, rounding: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The table rounded and then in `dtype`, as the head multiplies it; the gradient passes straight through. Needs a mesh.

    Each device rounds its own rows, a part at a time: rounding to a grid takes five times the memory of what it rounds
    (905 MiB of temporaries in a loss that takes 382 without a grid, for a 16th of 31B's table).
    """
    cut = cut_of((), table_VW.shape[0])
    rows = table_VW.shape[0] // cut.size(cut.vocabulary)
    count = math.gcd(rows, _count(rows, table_VW.shape[1] * 4))

    def local(table):
        parts = jax.lax.map(lambda part: rounding(part).astype(dtype), table.reshape(count, rows // count, -1))
        return parts.reshape(table.shape)

    @jax.custom_vjp
    def through(table):
        return island(cut, local, (cut.table,), cut.table)(table)

    through.defvjp(lambda table: (through(table), None), lambda _, d: (d.astype(table_VW.dtype),))
    return through(table_VW)


def logits(hidden: jax.Array, table_VD: jax.Array) -> jax.Array:
    """float32 hidden . table^T [..., V] on a mesh: hidden states travel, the table stays. Needs a mesh.

    Of [B, T, D] the logits stay cut along V. Of [B, D], a step of decoding, each device gets all logits of its own rows by
    all-to-all, V * 4 bytes received per row, so that the sampler never meets a cut vocabulary and works on each row once: rows
    are cut over the axes of the vocabulary too, the outermost that divide them, and whole along the others.
    """
    cut = cut_of(hidden.shape[:-1], table_VD.shape[0])
    by_row, rest = (), cut.vocabulary
    while hidden.ndim == 2 and rest and hidden.shape[0] % cut.size((*cut.copies, *by_row, rest[0])) == 0:
        by_row, rest = (*by_row, rest[0]), rest[1:]

    def product(hidden, table):
        for dim, entry in enumerate(cut.tokens):
            axes = tuple(axis for axis in cut.shared if axis in axes_in(entry))
            hidden = jax.lax.all_gather(hidden, axes, axis=dim, tiled=True) if axes else hidden
        out = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
        if out.ndim > 2:
            return out
        if by_row:
            out = jax.lax.all_to_all(out, by_row, 0, 1, tiled=True)
        if rest:
            parts = jax.lax.all_gather(out.reshape(out.shape[0], cut.size(by_row), -1), rest, axis=2, tiled=True)
            out = parts.reshape(out.shape[0], -1)
        return out

    whole = [None] * (hidden.ndim - 2)
    by_token = PartitionSpec((*cut.copies, *by_row) or None, *whole, cut.vocabulary if hidden.ndim > 2 else None)
    return island(cut, product, (cut.vectors, cut.table), by_token)(hidden, table_VD)


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The parts [m, ...] of all devices along `axes`, one after the other; inside an island."""
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices along `axes`; inside an island."""
    return jax.lax.psum(x, axes) if axes else x


def scatter_total(x: jax.Array, cut: Cut) -> jax.Array:
    """The sum over the devices of a table of what each has for all their tokens, of which each gets its own; inverse of `gather`.

    Sums are cut along the shared axes before they are made along the idle ones, where every device needs them all.
    """
    return total(jax.lax.psum_scatter(x, cut.shared, tiled=True) if cut.shared else x, cut.idle)


def _look_everywhere(cut: Cut, rows: int, ids_M: jax.Array, own: Callable, _shape, _dtype) -> jax.Array:
    """Every device looks for the ids of all; what it does not have is 0 and adds nothing."""
    local = gather(ids_M, cut.shared) - cut.first_row(rows)
    found = jnp.where(((local >= 0) & (local < rows))[:, None], own(local), 0)
    return scatter_total(found, cut)


def _add_everywhere(cut: Cut, rows: int, ids_M: jax.Array, d_MW: jax.Array, add: Callable, d_table: jax.Array):
    """The reverse of `_look_everywhere`."""
    local = gather(ids_M, cut.shared) - cut.first_row(rows)
    # A negative index would count from the end.
    return add(d_table, jnp.where(local < 0, rows, local), gather(d_MW, cut.shared))


class _Link(NamedTuple):
    """n devices along `axes` with `rows` rows each. `everyone` takes as many rounds as the slowest device needs, other copies of
    the table too: they have nothing to wait for, but loops of one program that differ from device to device are a risk."""

    axes: tuple[str, ...]
    everyone: tuple[str, ...]
    n: int
    rows: int

    @property
    def nothing(self) -> int:
        """Stands for no id; larger than all."""
        return self.n * self.rows

    def swap(self, x: jax.Array) -> jax.Array:
        """Block j of [n * C, ...] goes to device j, whose block comes back in its place."""
        return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)

    def to_middleman(self, ids: jax.Array) -> jax.Array:
        """A renumbering that gives id mod n block id mod n; nobody's id stays nobody's."""
        return jnp.where(ids < self.nothing, ids % self.n * self.rows + ids // self.n, ids)

    def from_middleman(self, codes: jax.Array) -> jax.Array:
        return jnp.where(codes < self.nothing, codes % self.rows * self.n + codes // self.rows, codes)


class _Wanted(NamedTuple):
    """Distinct codes in order, padded with `nothing`; `place`: where among them each code given stands. Device j is asked for
    distinct[start[j] : start[j + 1]], C of them a round."""

    distinct: jax.Array
    place: jax.Array
    start: jax.Array
    capacity: int
    rounds: jax.Array


def _wanted(codes_Q: jax.Array, link: _Link) -> _Wanted:
    size = codes_Q.shape[0]
    ordered, order = jax.lax.sort((codes_Q, jnp.arange(size, dtype=jnp.int32)), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)])
    rank = jnp.cumsum(is_new, dtype=jnp.int32)
    distinct = jnp.full(size, link.nothing, jnp.int32).at[rank].set(ordered)
    bounds = jnp.arange(link.n + 1, dtype=jnp.int32) * link.rows
    start = jnp.searchsorted(distinct, bounds, method="compare_all").astype(jnp.int32)
    # Half of what is needed when all codes are distinct and evenly spread: in text fewer than half are distinct.
    capacity = -(-size // (2 * link.n))
    rounds = -(-jnp.max(start[1:] - start[:-1]) // capacity)
    place = jnp.zeros(size, jnp.int32).at[order].set(rank)
    return _Wanted(distinct, place, start, capacity, jax.lax.pmax(rounds, link.everyone))


def _questions(wanted: _Wanted, i: jax.Array, link: _Link) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Round i: the codes asked [n * C], block j for device j; their places among the distinct ones; which are real."""
    place = wanted.start[:-1, None] + i * wanted.capacity + jnp.arange(wanted.capacity, dtype=jnp.int32)[None]
    is_real = (place < wanted.start[1:, None]).reshape(-1)
    place = jnp.minimum(place.reshape(-1), wanted.distinct.shape[0] - 1)
    return jnp.where(is_real, wanted.distinct[place], link.nothing), place, is_real


def _fetch(codes_Q: jax.Array, serve: Callable, link: _Link, width: int, dtype: jnp.dtype) -> jax.Array:
    """Rows [Q, W] of codes; device code // rows knows them by `serve` (codes [M] -> rows [M, W])."""
    wanted = _wanted(codes_Q, link)
    owner = jnp.minimum(codes_Q // link.rows, link.n - 1)
    place = wanted.place - wanted.start[owner]

    def a_round(i, found):
        asked, _, _ = _questions(wanted, i, link)
        answers = link.swap(serve(link.swap(asked)))
        nth = place - i * wanted.capacity
        is_here = (nth >= 0) & (nth < wanted.capacity)
        return jnp.where(is_here[:, None], answers[jnp.where(is_here, owner * wanted.capacity + nth, 0)], found)

    return jax.lax.fori_loop(0, wanted.rounds, a_round, jnp.zeros((codes_Q.shape[0], width), dtype))


def _give(codes_Q: jax.Array, d_QW: jax.Array, take: Callable, state: jax.Array, link: _Link) -> jax.Array:
    """The reverse of `_fetch`: d_QW, summed where codes are equal, to device code // rows, which does `take(state, codes, d)`."""
    wanted = _wanted(codes_Q, link)
    summed = jnp.zeros(d_QW.shape, jnp.float32).at[wanted.place].add(d_QW.astype(jnp.float32))

    def a_round(i, state):
        codes, place, is_real = _questions(wanted, i, link)
        d = jnp.where(is_real[:, None], summed[place], 0.0).astype(d_QW.dtype)
        return take(state, link.swap(codes), link.swap(d))

    return jax.lax.fori_loop(0, wanted.rounds, a_round, state)


class _Parts(NamedTuple):
    """This device's share of M tokens that `idle` devices have in common, as [parts, Q]; both padded at the end."""

    count: int
    size: int
    share: int
    tokens: int
    idle: tuple[str, ...]

    def cut(self, x: jax.Array, padding: int) -> jax.Array:
        def pad(x, size):
            return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=padding)

        if self.idle:
            x = pad(x, self.share * jax.lax.axis_size(self.idle))
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.idle) * self.share, self.share)
        return pad(x, self.count * self.size).reshape(self.count, self.size, *x.shape[1:])

    def join(self, parts: jax.Array) -> jax.Array:
        return gather(parts.reshape(-1, *parts.shape[2:])[: self.share], self.idle)[: self.tokens]


def _parts(cut: Cut, tokens: int, row_bytes: int) -> _Parts:
    share = -(-tokens // cut.size(cut.idle))
    count = _count(share, row_bytes)
    return _Parts(count, -(-share // count), share, tokens, cut.idle)


def _count(rows: int, row_bytes: int) -> int:
    """Parts of at most PART_BYTES; a power of two, which divides most batches."""
    return 1 << (-(-rows // max(1, PART_BYTES // row_bytes)) - 1).bit_length()


def _link(cut: Cut, rows: int) -> _Link:
    return _Link(cut.vocabulary, cut.everyone, cut.size(cut.vocabulary), rows)


def _exchange(cut: Cut, rows: int, ids_M: jax.Array, own: Callable, width: int, dtype: jnp.dtype) -> jax.Array:
    """Rows of ids by way of middlemen, a part of the tokens at a time."""
    link, parts = _link(cut, rows), _parts(cut, ids_M.shape[0], width * dtype.itemsize)

    def owner(ids):
        return own(ids - cut.first_row(rows))

    def middleman(codes):
        return _fetch(link.from_middleman(codes), owner, link, width, dtype)

    def part(ids_Q):
        return _fetch(link.to_middleman(ids_Q), middleman, link, width, dtype)

    return parts.join(jax.lax.map(part, parts.cut(ids_M, link.nothing)))


def _exchange_back(cut: Cut, rows: int, ids_M: jax.Array, d_MW: jax.Array, add: Callable, d_table: jax.Array):
    """The reverse of `_exchange`."""
    link = _link(cut, rows)
    parts = _parts(cut, ids_M.shape[0], d_MW.shape[1] * d_MW.dtype.itemsize)

    def owner(d_table, ids, d):
        return add(d_table, ids - cut.first_row(rows), d)  # nobody's id lies beyond everyone's rows

    def middleman(d_table, codes, d):
        return _give(link.from_middleman(codes), d, owner, d_table, link)

    def part(d_table, ids_d):
        ids, d = ids_d
        return _give(link.to_middleman(ids), d, middleman, d_table, link), None

    return jax.lax.scan(part, d_table, (parts.cut(ids_M, link.nothing), parts.cut(d_MW, 0)))[0]

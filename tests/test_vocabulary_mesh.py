"""Lookup, loss and logits over a table cut by rows give the numbers and gradients of one device, and no table is gathered."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gemma4_jax.errors import UserError
from gemma4_jax.kernels import cross_entropy, vocabulary
from gemma4_jax.kernels.cross_entropy import Likeliest, token_losses
from gemma4_jax.model.embed import Embedding
from gemma4_jax.quant.grids import Q4_0
from gemma4_jax.sharding import make_mesh

B, T, V, D = 8, 6, 64, 32
FSDP, DATA, TENSOR = {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}
MIX = {"expert": 2, "context": 2, "tensor": 2}
ROW = D * 4
EXCHANGE = {"FEW_BYTES": 0, "PART_BYTES": 4 * ROW}  # parts of 4 tokens


def embedding(table=None, vocab=V, grid=None):
    module: Any = Embedding(vocab, {"embed": D}, D, role="embedding", std=1.0, rngs=nnx.Rngs(params=0), dtype="float32")
    module.grid = grid
    if table is not None:
        module.w = module.w.replace(table)
    return module


def inputs(batch=B, kind="text"):
    """table, hidden, tokens, targets, weights, teacher; the first devices have more trained tokens than the last."""
    rng = np.random.default_rng(5)
    shape = batch, T

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tokens = {
        "text": np.minimum(rng.zipf(1.4, shape), V) - 1,  # mostly the first device's
        "one": np.full(shape, 3),
        "last": V - 1 - np.arange(batch * T).reshape(shape) % (V // 8),  # all of the last device's rows
    }[kind]
    weights = np.where(rng.random(shape) < np.linspace(1.0, 0.0, batch)[:, None], rng.random(shape), 0.0)
    targets = np.where(weights > 0, rng.integers(0, V, shape), -1)
    ints = (jnp.asarray(x, jnp.int32) for x in (tokens, targets))
    return normal(V, D), normal(*shape, D), *ints, jnp.asarray(weights, jnp.float32), (normal(*shape, 5), normal(V, 5))


def step(grid, with_teacher, **options):
    """(loss, (looked-up rows, sums)), and the gradients of the table and the hidden states."""

    def loss(table, hidden, tokens, targets, weights, teacher):
        embed = embedding(table, grid=grid)
        rows = embed.lookup(tokens, "float32")
        if with_teacher == "kept":
            log_p, ids = jax.lax.top_k(jax.nn.log_softmax(teacher[0] @ teacher[1].T), 4)
            teacher = Likeliest(ids, jnp.concatenate([log_p, jnp.log1p(-jnp.exp(log_p).sum(-1, keepdims=True))], -1))
        taught = {"teacher": teacher, "distill_weight": 0.3} if with_teacher else {}
        total, sums = token_losses(0.3 * (rows + hidden), embed.head("float32"), targets, weights, **taught, **options)
        return total, (rows, sums)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


CASES = {
    "fsdp": (FSDP, EXCHANGE, {"chunk": 2}, {}),
    "fsdp, everywhere, kl": (FSDP, {}, {"with_teacher": True}, {}),
    "fsdp, one token": (FSDP, EXCHANGE, {"chunk": 4}, {"kind": "one"}),
    "fsdp, one owner": (FSDP, EXCHANGE, {"chunk": 4}, {"kind": "last"}),
    "data and fsdp, kl, grid": (DATA, EXCHANGE, {"chunk": 3, "with_teacher": True, "grid": Q4_0}, {}),
    "data and fsdp, batch whole": (DATA, EXCHANGE, {"chunk": 4}, {"batch": 3}),
    "mix, likeliest": (MIX, EXCHANGE, {"chunk": 3, "with_teacher": "kept"}, {}),
    "tensor, reverse kl": (TENSOR, EXCHANGE, {"chunk": 5, "with_teacher": True, "reverse_kl": True}, {}),
    "mix, grid, no cap": (MIX, EXCHANGE, {"chunk": 2, "grid": Q4_0, "softcap": None}, {}),
    "mix, everywhere, batch whole": (MIX, {}, {}, {"batch": 3}),
    "data alone": ({"data": 8}, EXCHANGE, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_gives_the_numbers_and_gradients_of_one_device(case, monkeypatch):
    sizes, limits, options, which = CASES[case]
    options = {"grid": None, "with_teacher": False, "softcap": 30.0, **options}
    arrays = inputs(**which)
    (loss, (rows, sums)), gradients = step(**options)(*arrays)
    for name, size in limits.items():
        monkeypatch.setattr(vocabulary, name, size)
    with jax.set_mesh(make_mesh(sizes)):
        (got_loss, (got_rows, got_sums)), got_gradients = step(**options)(*arrays)
    np.testing.assert_array_equal(got_rows, rows)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    assert bool(options["with_teacher"]) == (sums["kl_sum"] > 0.1)
    for name, wanted in sums.items():
        np.testing.assert_allclose(got_sums[name], wanted, rtol=1e-5, err_msg=name)
    for name, got, wanted in zip(("d_table", "d_hidden"), got_gradients, gradients, strict=True):
        scale = np.abs(wanted).max()
        assert scale > 0.01
        np.testing.assert_allclose(got, wanted, atol=2e-6 * scale, rtol=0, err_msg=name)
    assert got_gradients[0].sharding.is_fully_replicated == (sizes == {"data": 8})


def test_bfloat16_rows_travel_exactly_and_their_gradient_is_rounded_once_per_stop(monkeypatch):
    table, _, tokens, *_ = inputs()
    d = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), jnp.bfloat16)

    def both(table, tokens, d):
        rows, back = jax.vjp(lambda table: embedding(table).lookup(tokens, "bfloat16"), table)
        return rows, back(d)[0]

    rows, d_table = jax.jit(both)(table, tokens, d)
    for name, size in EXCHANGE.items():
        monkeypatch.setattr(vocabulary, name, size)
    with jax.set_mesh(make_mesh(TENSOR)):
        got_rows, got = jax.jit(both)(table, tokens, d)
    np.testing.assert_array_equal(got_rows, rows)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, d_table, atol=2**-7 * np.abs(d_table).max())


@pytest.mark.parametrize("sizes", [FSDP, {"data": 2, "fsdp": 2, "tensor": 2}, MIX], ids=str)
@pytest.mark.parametrize("shape", [(8,), (2,), (1,), (8, 6)], ids=str)
def test_logits(sizes, shape):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((*shape, D), (V, D)))
    with jax.set_mesh(make_mesh(sizes)):
        got = jax.jit(vocabulary.logits)(hidden, table)
    np.testing.assert_allclose(got, hidden @ table.T, rtol=1e-5, atol=1e-5)
    local = got.addressable_shards[0].data.shape
    assert local[-1] == (V if len(shape) == 1 else V // (8 // sizes.get("data", 1)))
    if len(shape) == 1:
        assert local[0] == {8: 1, 2: 1 if sizes != FSDP else 2, 1: 1}[shape[0]]


def test_no_table_is_gathered(monkeypatch):
    """In the compiled step no collective has an operand or a result as large as the table, its gradient included."""
    for name, size in EXCHANGE.items():
        monkeypatch.setattr(vocabulary, name, size)
    mesh = make_mesh(MIX)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, vocabulary.cut_of((B, T), V).table)
        table, *rest = inputs()
        compiled = step(Q4_0, False, softcap=30.0, chunk=2).lower(jax.device_put(table, where), *rest).compile()
    sizes: dict[str, int] = {}
    for result, kind in re.findall(
        r" = (.*) (all-[\w-]+|reduce-scatter|collective-permute)\(", compiled.as_text() or ""
    ):
        for dims in re.findall(r"\w\[([\d,]*)\]", result):
            sizes[kind] = max(sizes.get(kind, 0), math.prod(int(size) for size in dims.split(",") if size))
    assert set(sizes) >= {"all-gather", "all-to-all", "all-reduce", "reduce-scatter"}
    assert max(sizes.values()) < V * D / 2


def test_a_chunk_on_a_mesh_is_bounded_by_its_logits():
    """The published table: 2,048 rows of 16 devices, or 1,024 of 8, are 128 MiB of logits each."""
    for sizes, rows in (({"fsdp": 8}, 128), ({"fsdp": 4, "tensor": 2}, 256), ({"data": 8}, 128)):
        with jax.set_mesh(make_mesh(sizes)):
            assert cross_entropy.mesh_chunk(262_144, vocabulary.cut_of((64, 4096), 262_144)) == rows


def test_a_vocabulary_that_does_not_divide_is_refused():
    tokens = jnp.zeros((B, T), jnp.int32)
    with (
        jax.set_mesh(make_mesh(MIX)),
        pytest.raises(UserError, match=r"50 rows .*axes expert 2 x context 2 x tensor 2, 8 devices"),
    ):
        embedding(vocab=50).lookup(tokens, "float32")

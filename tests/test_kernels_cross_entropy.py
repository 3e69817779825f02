"""The chunked loss gives the numbers and gradients of the reference without ever holding [tokens, vocabulary]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.kernels import reference
from gemma4_jax.kernels.cross_entropy import CHUNK_BYTES, Likeliest, default_chunk, token_losses

M, D, V, CAP = 37, 8, 50, 30.0
# float32: two orders of summation. bf16: the gradient of the logits is rounded once to bf16 (2^-8) before the products.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1.5e-2}


def inputs(dtype=jnp.float32, weights="some"):
    rng = np.random.default_rng(3)

    def normal(rows, width, scale=1.0):
        return jnp.asarray((scale * rng.standard_normal((rows, width))).astype(dtype))

    hidden, table, teacher = normal(M, D, 3.0), normal(V, D, 2.0), (normal(M, 5), normal(V, 5))
    fractions = rng.random(M)
    weights_M = {
        "some": fractions < 0.5,
        "fractional": np.where(np.arange(M) % 3 > 0, fractions, 0.0),
        "all": np.ones(M),
        "none": np.zeros(M),
    }[weights]
    # Targets of rows without weight are never read, so they may be anything.
    targets = jnp.asarray(np.where(weights_M > 0, rng.integers(0, V, M), -1), jnp.int32)
    weights_M = jnp.asarray(weights_M, jnp.float32)
    return hidden, table, targets, weights_M, teacher


@functools.cache
def compiled(function, **options):
    """(value, aux, gradients) and the loss without gradients, as one compiled function of the arrays."""

    def loss(hidden, table, targets, weights, teacher):
        return function(hidden, table, targets, weights, softcap=CAP, teacher=teacher, **options)

    def everything(*arrays):
        (value, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arrays)
        return value, aux, gradients, loss(*arrays)[0]

    return jax.jit(everything)


def run(function, hidden, table, targets, weights, teacher=None, **options):
    value, aux, gradients, alone = compiled(function, **options)(hidden, table, targets, weights, teacher)
    np.testing.assert_allclose(alone, value, rtol=1e-6)
    return value, aux, gradients


def assert_same(got, wanted, dtype):
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for name in ("ce_sum", "kl_sum", "correct_sum"):
        assert got[1][name].dtype == jnp.float32
        np.testing.assert_allclose(got[1][name], wanted[1][name], rtol=1e-5, atol=1e-5, err_msg=name)
    for name, a, b in zip(("d_hidden", "d_table"), got[2], wanted[2], strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("chunk", "dtype"), [(1, jnp.float32), (8, jnp.float32), (8, jnp.bfloat16), (None, jnp.float32)]
)
def test_matches_reference(chunk, dtype):
    for weights in ("some", "fractional", "all", "none"):
        *arrays, _ = inputs(dtype, weights)
        assert_same(run(token_losses, *arrays, chunk=chunk), run(reference.token_losses, *arrays), dtype)


@pytest.mark.parametrize(
    ("distill_weight", "reverse_kl", "dtype"),
    [(0.3, False, jnp.float32), (0.3, True, jnp.float32), (1.0, True, jnp.bfloat16), (0.0, False, jnp.float32)],
)
def test_distillation_matches_reference(distill_weight, reverse_kl, dtype):
    arrays = inputs(dtype, "fractional")
    options = {"distill_weight": distill_weight, "reverse_kl": reverse_kl}
    got = run(token_losses, *arrays, chunk=8, **options)
    assert got[1]["kl_sum"] > 0.1
    assert_same(got, run(reference.token_losses, *arrays, **options), dtype)


def test_rows_of_a_batch_are_rows():
    """[B, T] rows give the numbers of [B * T] rows, and a gradient of their own shape."""
    hidden, table, targets, weights, teacher = (jax.tree.map(lambda x: x[:36], x) for x in inputs())
    wanted = run(token_losses, hidden, table, targets, weights, (teacher[0], teacher[1]), chunk=8, distill_weight=0.3)
    hidden, taught, targets, weights = (x.reshape(4, 9, *x.shape[1:]) for x in (hidden, teacher[0], targets, weights))
    value, sums, (d_hidden, d_table) = run(
        token_losses, hidden, table, targets, weights, (taught, teacher[1]), chunk=8, distill_weight=0.3
    )
    assert d_hidden.shape == hidden.shape
    assert_same((value, sums, (d_hidden.reshape(36, D), d_table)), wanted, jnp.float32)


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_the_likeliest_tokens_of_a_teacher_are_taught(reverse_kl):
    """Equal to the divergence of both distributions with all other tokens as one, written out; a bound of the whole one."""
    hidden, table, targets, weights, whole = inputs(weights="fractional")
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(CAP * jnp.tanh(whole[0] @ whole[1].T / CAP)), 6)
    log_t = jnp.concatenate([log_p, jnp.log1p(-jnp.exp(log_p).sum(-1, keepdims=True))], -1)

    def wanted(hidden, table):
        log_q = jax.nn.log_softmax(CAP * jnp.tanh(hidden @ table.T / CAP))
        log_q = jnp.take_along_axis(log_q, ids, 1)
        log_q = jnp.concatenate([log_q, jnp.log1p(-jnp.exp(log_q).sum(-1, keepdims=True))], -1)
        first, second = (log_q, log_t) if reverse_kl else (log_t, log_q)
        return (weights[:, None] * jnp.exp(first) * (first - second)).sum()

    value, gradients = jax.jit(jax.value_and_grad(wanted, argnums=(0, 1)))(0.2 * hidden, table)
    options = dict(chunk=8, distill_weight=1.0, reverse_kl=reverse_kl)
    got = run(token_losses, 0.2 * hidden, table, targets, weights, Likeliest(ids, log_t), **options)
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    for mine, theirs in zip(got[2], gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
    assert value < run(token_losses, 0.2 * hidden, table, targets, weights, whole, **options)[0]


def test_a_teacher_equal_to_the_student_costs_nothing():
    hidden, table, targets, weights, _ = inputs()
    got = run(token_losses, hidden, table, targets, weights, teacher=(hidden, table), distill_weight=1.0, chunk=8)
    for number in (got[0], got[1]["kl_sum"], *got[2]):
        np.testing.assert_allclose(number, 0.0, atol=1e-4)


def test_no_weights_give_zero_loss_and_zero_gradients():
    *arrays, _ = inputs(weights="none")
    value, aux, (d_hidden, d_table) = run(token_losses, *arrays, chunk=8)
    assert [value, *aux.values()] == [0, 0, 0, 0]
    assert not d_hidden.any()
    assert not d_table.any()


def test_gradients_scale_with_the_cotangent_and_only_the_loss_has_one():
    hidden, table, targets, weights, _ = inputs()

    def scaled(hidden):
        loss, aux = token_losses(hidden, table, targets, weights, softcap=CAP, chunk=8)
        return loss * 0.25 + 100.0 * aux["ce_sum"] + aux["correct_sum"]

    one = jax.grad(lambda h: token_losses(h, table, targets, weights, softcap=CAP, chunk=8)[0])(hidden)
    np.testing.assert_allclose(jax.grad(scaled)(hidden), 0.25 * one, rtol=1e-6)


def test_of_a_frozen_table_no_gradient_is_made():
    """Also before XLA removes what nothing reads: two products a chunk where there were three, and the same numbers."""
    hidden, table, targets, weights, _ = inputs()

    def loss(hidden, table):
        return token_losses(hidden, table, targets, weights, softcap=CAP, chunk=8)

    def products(argnums) -> int:
        return str(jax.make_jaxpr(jax.grad(loss, argnums, has_aux=True))(hidden, table)).count("dot_general[")

    assert (products((0, 1)), products((0,))) == (3, 2)
    (value, aux), (d_hidden,) = jax.jit(jax.value_and_grad(loss, (0,), has_aux=True))(hidden, table)
    wanted = run(token_losses, hidden, table, targets, weights, chunk=8)
    np.testing.assert_allclose([value, aux["ce_sum"]], [wanted[0], wanted[1]["ce_sum"]], rtol=1e-6)
    np.testing.assert_allclose(d_hidden, wanted[2][0], rtol=1e-6, atol=1e-7)


def test_the_soft_cap_is_in_the_loss():
    """Without the cap the same rows cost something else: logits here reach 60."""
    *arrays, _ = inputs(weights="all")
    capped = token_losses(*arrays, softcap=CAP, chunk=8)[0]
    uncapped = token_losses(*arrays, softcap=1e6, chunk=8)[0]
    assert abs(capped - uncapped) > 1.0


def test_the_targets_of_correct_rows_are_counted_with_their_weight():
    hidden, table, _, weights, _ = inputs(weights="fractional")
    best = reference.capped_logits(hidden, table, CAP).argmax(axis=-1).astype(jnp.int32)
    targets = jnp.where(jnp.arange(M) < 20, best, (best + 1) % V)
    aux = token_losses(hidden, table, targets, weights, softcap=CAP, chunk=8)[1]
    np.testing.assert_allclose(aux["correct_sum"], weights[:20].sum(), rtol=1e-6)


def test_memory_holds_no_row_of_logits_per_token():
    """4,096 rows of 32,768 classes are 512 MiB of logits; with chunks of 64 rows (8 MiB) less than a fifth is used."""
    rows, vocabulary, width, chunk = 4096, 32_768, 16, 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (vocabulary, width), (rows,))]
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def loss(hidden, table, weights, targets):
        return token_losses(hidden, table, targets, weights, softcap=CAP, chunk=chunk)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, targets).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < rows * vocabulary * 4 / 5


def test_default_chunk_fills_its_budget():
    assert default_chunk(262_144) == 128
    assert default_chunk(32_768) * 32_768 * 4 == CHUNK_BYTES
    assert default_chunk(10**9) == 128


def test_wrong_arguments_are_refused():
    hidden, table, targets, weights, teacher = inputs()
    with pytest.raises(ValueError, match="one dtype"):
        token_losses(hidden.astype(jnp.bfloat16), table, targets, weights, softcap=CAP)
    with pytest.raises(ValueError, match="needs a teacher"):
        token_losses(hidden, table, targets, weights, softcap=CAP, distill_weight=0.5)
    with pytest.raises(ValueError, match="classes as the student"):
        token_losses(hidden, table, targets, weights, softcap=CAP, teacher=(teacher[0], teacher[1][:-1]))
    with pytest.raises(ValueError, match="wants hidden"):
        token_losses(hidden, table, targets[:-1], weights, softcap=CAP)

"""Experts and router on a mesh give the numbers and gradients of one device, whatever the routing, and drop nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gemma4_jax.config import ModelConfig
from gemma4_jax.kernels import expert_routes
from gemma4_jax.kernels.experts import IN_DIMS, Cut
from gemma4_jax.model.moe import ExpertLoad, Experts, Router, balance_loss, expert_load, load_stats
from gemma4_jax.sharding import activation_spec, make_mesh, stored_spec

B, T, D = 8, 6, 16
CFG = dataclasses.replace(
    ModelConfig.variant("tiny_26b_a4b"), hidden_size=D, num_experts=8, top_k_experts=2, moe_intermediate_size=12
)
MESHES = {
    "exchange": {"expert": 4, "fsdp": 2},
    "gather, tensor": {"expert": 2, "tensor": 2, "fsdp": 2},
    "gather, context": {"expert": 2, "context": 2, "data": 2},
    "whole": {"fsdp": 8},
}
# float32 sums of at most 48 tokens' contributions of order 1 in another order.
TOLERANCE = 2e-5


def arrays(kind="random", batch=B):
    rng = np.random.default_rng(3)
    router = Router(CFG, stack={}, rngs=nnx.Rngs(params=1), dtype="float32")
    experts = Experts(CFG, stack={}, rngs=nnx.Rngs(params=2), dtype="float32")
    state = {"router": nnx.state(router), "experts": nnx.state(experts)}
    state = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype) * 0.5 + 0.2, state)
    x = jnp.asarray(rng.standard_normal((batch, T, D)), jnp.float32)
    if kind == "one expert":  # every token's first choice is expert 5, and most second choices are expert 2
        x = jnp.abs(x)
        state["router"].proj.w[...] = (
            jnp.zeros((D, 8)).at[:, 5].set(4.0).at[:, 2].set(2.0) + state["router"].proj.w[...] * 0.1
        )
        state["router"].scale[...] = jnp.ones((D,))
    target = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    return nnx.split(router)[0], nnx.split(experts)[0], state, x, target


def outputs(router_def, experts_def, state, x, target):
    """out, load statistics, balance loss, and the gradients of their sum with respect to x and every parameter."""

    def loss(state, x):
        routing = nnx.merge(router_def, state["router"])(x)
        out = nnx.merge(experts_def, state["experts"])(x, routing.weights, routing.index)
        balance = balance_loss(routing.load)
        return jnp.sum(out * target) + 3.0 * balance, (out, load_stats(routing.load), balance)

    (_, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return aux, gradients


def run(kind, mesh_sizes, batch=B):
    router_def, experts_def, *values = arrays(kind, batch)
    step = jax.jit(lambda *values: outputs(router_def, experts_def, *values))
    if mesh_sizes is None:
        return step(*values)
    mesh = make_mesh(mesh_sizes)
    with jax.set_mesh(mesh):
        aux, gradients = step(*values)
    d_in = gradients[0]["experts"].gate_up.w[...]
    rests = NamedSharding(mesh, stored_spec(mesh, IN_DIMS, d_in.shape))
    assert d_in.sharding.is_equivalent_to(rests, d_in.ndim)
    return aux, gradients


def assert_same(got, wanted):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=TOLERANCE * max(1.0, np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
        ),
        got,
        wanted,
    )


@pytest.fixture(scope="module")
def one_device():
    return {key: run(*key[:1], None, *key[1:]) for key in [("random", B), ("one expert", B), ("random", 1)]}


def test_one_device_is_the_plain_sum(one_device):
    _, _, state, x, _ = arrays()
    (out, *_), _ = one_device["random", B]
    router = Router(CFG, stack={}, rngs=nnx.Rngs(params=1), dtype="float32")
    nnx.update(router, state["router"])
    routing = router(x)
    w_in, w_out = state["experts"].gate_up.w[...], state["experts"].down.w[...]
    gate, up = jnp.moveaxis(jnp.einsum("BTD,EDCF->BTECF", x, w_in), 3, 0)
    every = jnp.einsum("BTEF,EFD->BTED", jax.nn.gelu(gate, approximate=True) * up, w_out)
    wanted = jnp.sum(jnp.take_along_axis(every, routing.index[..., None], 2) * routing.weights[..., None], axis=2)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["random", "one expert"])
@pytest.mark.parametrize("name", MESHES)
def test_mesh_gives_the_numbers_of_one_device(name, kind, one_device, monkeypatch):
    """Blocks of 5 rows: every device needs several, and how many differs from device to device."""
    monkeypatch.setattr(expert_routes, "block_rows", lambda share, most, largest: min(5, most))
    routes = watch_routes(monkeypatch)
    assert_same(run(kind, MESHES[name]), one_device[kind, B])
    assert routes == {name.split(",")[0]}


@pytest.mark.parametrize("name", ["exchange", "gather, tensor"])
def test_one_block_for_the_worst_case(name, one_device):
    assert_same(run("one expert", MESHES[name]), one_device["one expert", B])


def test_a_batch_that_cannot_be_cut(one_device, monkeypatch):
    """Every device along the axis has all tokens; nothing is gathered."""
    routes = watch_routes(monkeypatch)
    assert_same(run("random", MESHES["exchange"], 1), one_device["random", 1])
    assert routes == {"replicated"}


def watch_routes(monkeypatch):
    seen, route = set(), Cut.route

    def watched(cut):
        seen.add(route.__get__(cut))
        return route.__get__(cut)

    monkeypatch.setattr(Cut, "route", property(watched))
    return seen


def test_routing_stays_on_its_device():
    """No probabilities travel: only the sums over tokens (load and gradients) are reduced."""
    router = Router(CFG, stack={}, rngs=nnx.Rngs(params=1), dtype="float32")
    mesh = make_mesh({"expert": 2, "context": 2, "data": 2})
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, activation_spec(mesh, ("batch", "length", None), (B, T, D)))
        x = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=cut)
        text = str(jax.jit(lambda x: router(x)).lower(x).compile().as_text())
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_load_and_balance():
    even, one = ([8.0] * 4, [8.0] * 4), ([32.0, 0.0, 0.0, 0.0], [16.0, 0.0, 0.0, 0.0])
    load = ExpertLoad(*(jnp.array(values) for values in zip(even, one, strict=True)))
    assert load_stats(load) == {"max_load": (1 + 4) / 2, "unused": 3 / 8}
    assert balance_loss(ExpertLoad(*map(jnp.array, even))) == 1.0
    assert balance_loss(ExpertLoad(*map(jnp.array, one))) == 4.0
    # More probability for a busy expert costs more.
    d_probability = jax.grad(lambda p: balance_loss(ExpertLoad(jnp.array([6.0, 2.0]), p)))(jnp.array([2.0, 2.0]))
    np.testing.assert_allclose(d_probability, [2 * 0.75 / 4, 2 * 0.25 / 4])


def test_load_counts_valid_tokens_only():
    rng = np.random.default_rng(4)
    probability = jnp.asarray(rng.dirichlet(np.ones(5), (2, 3)), jnp.float32)
    index = jnp.argsort(-probability, axis=-1)[..., :2].astype(jnp.int32)
    valid = jnp.array([[True, False, True], [False, True, True]])
    load = expert_load(probability, index, valid)
    rows = np.bincount(np.asarray(index)[np.asarray(valid)].reshape(-1), minlength=5)
    np.testing.assert_array_equal(load.rows, rows)
    np.testing.assert_allclose(load.probability, np.asarray(probability)[np.asarray(valid)].sum(0), rtol=1e-6)

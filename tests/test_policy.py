"""Quantisation policies: what they cover in each variant, what they refuse, and that snapping is what training saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.parameters import arrays, variables, with_arrays
from gemma4_jax.model.transformer import abstract
from gemma4_jax.quant.grids import INT4_SYM7_G32, Q4_0
from gemma4_jax.quant.policy import DEFAULT_COVER, ROLES, QuantConfig, apply, coverage, quantisable, snap

TINY = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")
TOKENS = np.random.default_rng(0).integers(5, 1024, size=(1, 12)).astype(np.int32)
GRID = dict(zip(TINY, ("int4_sym7_g32", "int4_sym7_g32", "q4_0", "q4_0"), strict=True))

forward = jax.jit(lambda model: model(TOKENS))


@pytest.fixture(scope="module", params=TINY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """Random weights without `init`, whose compilation would take half of this file's time."""
    shapes = abstract(ModelConfig.variant(name))
    rng = np.random.default_rng(1)

    def fill(key, shape):
        if key.endswith(".w"):
            return jnp.asarray(rng.normal(size=shape.shape) * 0.1, shape.dtype)
        return jnp.ones(shape.shape, shape.dtype)

    return with_arrays(shapes, {key: fill(key, shape) for key, shape in arrays(shapes).items()})


@pytest.fixture(scope="module")
def quantised(name, model):
    return apply(model, QuantConfig(grid=GRID[name]))


@pytest.fixture(scope="module")
def snapped(quantised):
    return jax.jit(snap)(quantised)  # one compilation instead of thirty


def test_logits_move_and_snapping_gives_the_same(model, quantised, snapped):
    """Fake quantisation changes the logits of every variant; the snapped float model computes exactly the quantised ones."""
    plain, fake = forward(model), forward(quantised)
    assert float(jnp.abs(plain - fake).mean()) > 0.01
    np.testing.assert_array_equal(forward(snapped), fake)


def test_the_model_itself_is_left_alone(model, quantised, snapped):
    assert all(module.grid is None for _, module in quantisable(model))
    assert all((module.grid is not None) == (module.role in DEFAULT_COVER) for _, module in quantisable(quantised))
    assert all(module.grid is None for _, module in quantisable(snapped))
    before, after = arrays(model), arrays(quantised)
    assert all(after[key] is before[key] for key in before)
    assert [v.dims for v in variables(snapped).values()] == [v.dims for v in variables(model).values()]


def test_only_covered_weights_are_snapped(model, quantised, snapped):
    covered = {f"{name}.w" for name, module in quantisable(quantised) if module.grid is not None}
    before, after = arrays(model), arrays(snapped)
    moved = {key for key in before if (np.asarray(before[key]) != np.asarray(after[key])).any()}
    assert moved == covered
    assert jax.tree.structure(snapped) == jax.tree.structure(model)


@pytest.mark.parametrize("name", ["tiny_26b_a4b"], indirect=True)
def test_gradients_are_those_at_the_snapped_weights(quantised, snapped):
    """Straight through: dL/dw is dL/dq at q = snapped w, for a tied embedding, a dense layer and experts one after the other."""
    choice = jnp.arange(2 * TOKENS.size, dtype=jnp.int32).reshape(-1, 2) % 8

    @jax.jit
    @jax.grad
    def gradient(model):
        layer = jax.tree.map(lambda x: x[0], model.own.full)
        h = layer.mlp(model.embed.lookup(TOKENS, "float32"))
        flat = layer.sparse.experts(h.reshape(-1, h.shape[-1]), jnp.full(choice.shape, 0.5), choice)
        return jnp.square(model.logits(flat)).mean()

    ours, want = arrays(gradient(quantised)), arrays(gradient(snapped))
    reached = {key for key, value in want.items() if np.asarray(value).any()}
    names = ("mlp.gate", "mlp.up", "mlp.down", "sparse.experts.gate_up", "sparse.experts.down")
    assert reached == {"embed.w", *(f"own.full.{name}.w" for name in names)}
    for key in reached:  # matmuls may sum in another order
        assert float(jnp.linalg.norm(ours[key] - want[key])) <= 1e-5 * float(jnp.linalg.norm(want[key]))


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_unrolled_decoder_keeps_the_grids(quantised):
    decoder = unroll(quantised)
    grids = {module.grid for name, module in quantisable(decoder) if module.role in DEFAULT_COVER}
    assert grids == {INT4_SYM7_G32}


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_snap_one_parameter_at_a_time_equals_snap_in_jit(quantised, snapped):
    attention = quantised.own.full.attention
    np.testing.assert_array_equal(snap(attention).o.w[...], snapped.own.full.attention.o.w[...])


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_applying_again_replaces_the_grids(quantised):
    again = apply(quantised, QuantConfig(grid="q4_0", cover=("ffw", "per_layer_projection")))
    assert {module.role: module.grid for _, module in quantisable(again) if module.grid is not None} == {
        "ffw": Q4_0,
        "per_layer_projection": Q4_0,
    }


def test_coverage_adds_up(name, model, quantised):
    report = coverage(quantised)
    assert report.parameters == sum(x.size for x in jax.tree.leaves(model))
    assert sum(group.arrays for group in report.groups) == len(jax.tree.leaves(model))
    covered = sum(m.w.size for _, m in quantisable(quantised) if m.grid is not None)
    assert report.covered == covered > 0.9 * report.parameters
    for group in report.groups:
        bytes_a_weight = 2 if group.grid is None else 4.5 / 8
        assert group.bytes_after == pytest.approx(group.parameters * bytes_a_weight)
        assert (group.grid is None) == bool(group.reason)
    present = {group.role for group in report.groups if group.arrays}
    assert ("experts" in present) == ("router" in present) == (name == "tiny_26b_a4b")
    assert ("per_layer_embedding" in present) == (name in ("tiny_e2b", "tiny_e4b"))
    table = report.table()
    assert all(text in table for text in (*ROLES, GRID[name], f"{report.parameters:,}", "not in this model"))
    assert coverage(model).covered == 0


@pytest.mark.parametrize(("name", "billions"), [("e2b", 4.628), ("26b_a4b", 25.22), ("31b", 30.69)])
def test_full_size_models_are_covered(name, billions):
    """Every default group of the published sizes divides into blocks; only norms, router and one projection stay float."""
    report = coverage(apply(abstract(ModelConfig.variant(name)), QuantConfig()))
    assert report.covered / 1e9 == pytest.approx(billions, rel=0.005)
    assert report.covered > 0.995 * report.parameters


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(cover=("attention", "ffv")), "'ffv'.*did you mean 'ffw'"),
        (dict(cover=("router",)), "router.*never quantised"),
        (dict(cover=()), "cover is empty"),
        (dict(grid="q4_1"), "did you mean 'q4_0'"),
        (dict(distill_weight=1.5), "from 0 to 1"),
        (dict(distill_weight=0.0, teacher="x"), r"quant\.teacher is set"),
        (dict(distill_weight=0.0, reverse_kl=True), r"quant\.reverse_kl is set"),
    ],
)
def test_settings_are_checked(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        QuantConfig(**settings)


def test_a_named_group_must_exist():
    dense = abstract(ModelConfig.variant("tiny_31b"))
    with pytest.raises(UserError, match="names experts, but this model has no such"):
        apply(dense, QuantConfig(cover=("attention", "experts")))
    with pytest.raises(UserError, match=r"Nothing would be quantised.*experts"):
        apply(dense, QuantConfig(cover=("experts",)))


def test_a_model_without_weights_to_cover_is_refused():
    norm = abstract(ModelConfig.variant("tiny_31b")).final_norm
    with pytest.raises(UserError, match="Nothing would be quantised"):
        apply(norm, QuantConfig())


def test_snap_needs_grids():
    model = abstract(ModelConfig.variant("tiny_31b"))
    with pytest.raises(UserError, match="No weight of this model has a grid"):
        snap(model)


def test_a_dim_that_does_not_divide_names_the_parameter():
    model = abstract(ModelConfig.variant("tiny_31b", intermediate_size=72))
    with pytest.raises(UserError, match=r"own\.full\.mlp\.down\.w \(ffw\).*multiple of 32.*got 72"):
        apply(model, QuantConfig())
    assert coverage(apply(model, QuantConfig(cover=("attention",)))).covered > 0

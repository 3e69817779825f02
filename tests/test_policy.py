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
from gemma4_jax.quant import policies
from gemma4_jax.quant.grids import INT4_CHANNEL, Q4_0, grid_named
from gemma4_jax.quant.policies import POLICIES
from gemma4_jax.quant.policy import (
    ROLES,
    QuantConfig,
    apply,
    apply_names,
    coverage,
    grid_names,
    learning,
    quantisable,
    snap,
)

TINY = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")
TOKENS = np.random.default_rng(0).integers(5, 1024, size=(1, 12)).astype(np.int32)
POLICY = dict(zip(TINY, ("mobile", "w4a16", "q4_0", "int8"), strict=True))

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
    return apply(model, QuantConfig(policy=POLICY[name]))


@pytest.fixture(scope="module")
def snapped(quantised):
    return jax.jit(snap)(quantised)  # one compilation instead of thirty


def test_logits_move_and_snapping_gives_the_same(model, quantised, snapped):
    """Fake quantisation changes the logits of every variant; the snapped float model computes exactly the quantised ones."""
    plain, fake = forward(model), forward(quantised)
    assert float(jnp.abs(plain - fake).mean()) > 0.01
    np.testing.assert_array_equal(forward(snapped), fake)


def test_every_group_of_the_policy_moves_logits_by_itself(name, model):
    plain = forward(model)
    present = {module.role for _, module in quantisable(model)}
    covered = [role for role in POLICIES[POLICY[name]].grids if role in present]
    assert len(covered) >= 2
    for role in covered:
        rounded = snap(apply(model, QuantConfig(policy=POLICY[name], cover=(role,))))
        assert float(jnp.abs(forward(rounded) - plain).mean()) > 1e-5, role


def test_the_model_itself_is_left_alone(name, model, quantised, snapped):
    covered = POLICIES[POLICY[name]].grids
    assert all(module.grid is None for _, module in quantisable(model))
    assert all((module.grid is not None) == (module.role in covered) for _, module in quantisable(quantised))
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
    grids = {module.role: module.grid.name for _, module in quantisable(decoder)}
    assert grids == {**MOBILE, "per_layer_embedding": "int4_b32"}
    assert decoder.layers[0].mlp.gate.grid == INT4_CHANNEL


MOBILE = {role: grid for role, grid in POLICIES["mobile"].grids.items() if role != "per_layer_embedding"}


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_names_bring_every_grid_back(model, quantised):
    names = grid_names(quantised)
    assert names["own.full.mlp.up"] == "int4_channel"
    assert names["shared.sliding.mlp.up"] == "int2_channel"
    assert names["per_layer.table"] == "int4_b32"
    again = apply_names(model, names)
    assert [module.grid for _, module in quantisable(again)] == [module.grid for _, module in quantisable(quantised)]
    with pytest.raises(UserError, match=r"grids for own\.half\.mlp\.up"):
        apply_names(model, {**names, "own.half.mlp.up": "int4_channel"})


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_codes_of_modules_decode_to_what_the_model_computes_with(quantised, snapped):
    table, gate, q = quantised.per_layer.table, quantised.shared.full.mlp.gate, quantised.own.sliding.attention.q
    wanted = snapped.per_layer.table.w, snapped.shared.full.mlp.gate.w, snapped.own.sliding.attention.q.w
    for module, want, axis in zip((table, gate, q), wanted, (-1, -2, -2), strict=True):
        values = module.grid.decode(*module.encoded(), axis)
        np.testing.assert_array_equal(values.reshape(want.shape), want[...])


def test_the_table_people_read_is_the_policies():
    assert policies.__doc__ is not None
    lines = [line for line in policies.__doc__.splitlines() if line.startswith("|")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[1:] == list(POLICIES)
    written = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    for name, policy in POLICIES.items():
        for role in ROLES:
            want = policy.grids.get(role, "float" if role in policy.stays else "refused")
            assert written[role][name] == want, (role, name)
            assert not (role in policy.grids and role in policy.stays)


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_snap_one_parameter_at_a_time_equals_snap_in_jit(quantised, snapped):
    attention = quantised.own.full.attention
    np.testing.assert_array_equal(snap(attention).o.w[...], snapped.own.full.attention.o.w[...])


@pytest.mark.parametrize("name", ["tiny_e2b"], indirect=True)
def test_applying_again_replaces_the_grids(quantised):
    again = apply(quantised, QuantConfig(policy="w4a16", grid="q4_0", cover=("ffw", "per_layer_projection")))
    assert {module.role: module.grid for _, module in quantisable(again) if module.grid is not None} == {
        "ffw": Q4_0,
        "per_layer_projection": Q4_0,
    }


def test_coverage_adds_up(name, model, quantised):
    report = coverage(quantised, QuantConfig(policy=POLICY[name]).stays)
    leaves = jax.tree.leaves(quantised)  # with scales of activations, if the policy has them
    assert report.parameters == sum(x.size for x in leaves)
    assert sum(group.arrays for group in report.groups) == len(leaves)
    assert coverage(learning(quantised)) == coverage(quantised)
    covered = sum(m.w.size for _, m in quantisable(quantised) if m.grid is not None)
    assert report.covered == covered > 0.4 * report.parameters
    for group in report.groups:
        if group.grid is None:
            assert group.bytes_after == 2 * group.parameters
        elif group.grid.block:
            assert group.bytes_after == pytest.approx(group.parameters * group.grid.bits_per_weight / 8)
        else:
            assert 0.0 < group.bytes_after - group.parameters * group.grid.code_bits / 8 < 0.3 * group.parameters
        assert (group.grid is None) == bool(group.reason)
    present = {group.role for group in report.groups if group.arrays}
    assert ("experts" in present) == ("router" in present) == (name == "tiny_26b_a4b")
    assert ("per_layer_embedding" in present) == (name in ("tiny_e2b", "tiny_e4b"))
    table = report.table()
    assert all(text in table for text in (*ROLES, f"{report.parameters:,}", "not in this model"))
    assert coverage(model).covered == 0


@pytest.mark.parametrize(("name", "billions"), [("e2b", 4.628), ("26b_a4b", 25.22), ("31b", 30.69)])
def test_full_size_models_are_covered(name, billions):
    """Every default group of the published sizes divides into blocks; only norms, router and one projection stay float."""
    report = coverage(apply(abstract(ModelConfig.variant(name)), QuantConfig()), QuantConfig().stays)
    assert report.covered / 1e9 == pytest.approx(billions, rel=0.005)
    assert report.covered > 0.995 * report.parameters


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(cover=("attention", "ffv")), "'ffv'.*did you mean 'ffw'"),
        (dict(cover=("router",)), "router.*never quantised"),
        (dict(policy="w4a16", cover=("embedding",)), r"'embedding', for which quant\.policy=w4a16 has no grid"),
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


@pytest.mark.parametrize("name", ["26b_a4b", "31b"])
def test_mobile_is_for_the_small_models_alone(name):
    with pytest.raises(
        UserError, match=r"policy=mobile is a format of E2B and E4B alone.*no ffw_shared or per_layer_emb"
    ):
        apply(abstract(ModelConfig.variant(name)), QuantConfig(policy="mobile"))
    report = coverage(apply(abstract(ModelConfig.variant("e2b")), QuantConfig(policy="mobile")))
    table = next(group for group in report.groups if group.role == "per_layer_embedding")
    assert table.grid == grid_named("int4_b256")
    # Google's numbers for E2B: 1.12 GB of per-layer embeddings and 0.84 GB of other text weights, in GiB with a second int2 table.
    whole, head = sum(group.bytes_after for group in report.groups), 262144 * (1536 / 4 + 4)
    assert table.bytes_after / 2**30 == pytest.approx(1.12, abs=0.02)
    assert (whole - table.bytes_after + head) / 2**30 == pytest.approx(0.84, abs=0.03)

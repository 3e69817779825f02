"""Estimates without a compiler: shares against real shardings, work against counts by hand, and what a sweep promises."""

import dataclasses
import math
import time

import jax
import pytest
from jax.sharding import NamedSharding

from gemma4_jax import sharding
from gemma4_jax.chips import GiB, topology
from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.model.kv import CACHE_DIMS, empty_cache
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.lora import LoraConfig, adapted_shapes
from gemma4_jax.model.parameters import arrays, variables
from gemma4_jax.model.stack import REMAT
from gemma4_jax.model.transformer import abstract
from gemma4_jax.plan import checks, footprint, hlo, report, shares
from gemma4_jax.plan import workload as work
from gemma4_jax.plan.estimate import alternatives, estimate, meshes, sweep
from gemma4_jax.plan.job import Job, Program
from gemma4_jax.train.optimizer import trainable_names
from gemma4_jax.train.throughput import flops_per_token

TINY = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")
ONE = (1, 1, 1, 1, 1)


def job(name="31b", sizes=(1, 64, 1, 1, 1), rows=64, length=8192, program: Program = "sft", **fields):
    return Job(ModelConfig.variant(name), program, sizes, rows, length, **fields)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sizes", [(1, 4, 1, 1, 2), (2, 1, 2, 2, 1), (1, 2, 2, 1, 2)])
def test_shares_are_those_of_the_shardings(name, sizes):
    cfg = ModelConfig.variant(name)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    placed = sharding.parameter_shardings(mesh)
    found = {share.name: share for share in shares.shares(cfg, sizes)}
    for key, variable in variables(abstract(cfg)).items():
        shape = variable.get_value().shape
        assert found[key].stored == placed(key, variable).shard_shape(shape), key
        in_use = NamedSharding(mesh, sharding.use_spec(mesh, variable.dims, shape)).shard_shape(shape)
        assert math.prod(in_use) == found[key].used_elements * found[key].layers, key
    assert sum(x.size for x in arrays(abstract(cfg)).values()) == sum(
        share.elements for share in shares.shares(cfg, ONE)
    )


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1, 1), (2, 2, 1, 1, 2)])
def test_towers_rest_as_their_shardings_say(sizes):
    """In the parameters' dtype, in QAT the teacher's beside them; nothing beside them is trained."""
    whole = ModelConfig.variant("tiny_e2b", multimodal=True)
    placed = sharding.parameter_shardings(sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True))))
    parts = [(n, v) for n, v in variables(abstract(whole)).items() if n.startswith(("vision", "audio"))]
    shapes = [placed(name, v).shard_shape(v.shape) for name, v in parts]
    assert len(shapes) > 100
    four, two = (sum(shares.tiled_bytes(shape, size) for shape in shapes) for size in (4, 2))
    cases: list[tuple[Program, bool, int]]
    cases = [("sft", False, four), ("qat", True, four + two), ("decode", False, two)]
    for program, teacher, wanted in cases:
        tried = Job(whole.text_only(), program, sizes, 8, 64, teacher=teacher, whole=whole)
        without = footprint.footprint(dataclasses.replace(tried, whole=None))
        assert footprint.footprint(tried) == {**without, "towers": wanted}
    with pytest.raises(ValueError, match="cfg is of the text model"):
        Job(whole, "sft", sizes, 8, 64)


def test_cache_is_that_of_decoding():
    cfg, sizes = ModelConfig.variant("tiny_31b", head_dim=128, global_head_dim=256), (1, 2, 1, 2, 2)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    cache = jax.eval_shape(lambda: empty_cache(cfg, 16, 512, "bfloat16", cache_format=CacheFormat.of(cfg)))
    total = 0
    for x in jax.tree.leaves(cache):
        spec = sharding.activation_spec(mesh, CACHE_DIMS if x.ndim == 4 else ("batch", "slots"), x.shape)
        total += shares.tiled_bytes(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype.itemsize)
    assert shares.cache_bytes(cfg, sizes, 16, 512, 2) == total


@pytest.mark.parametrize("name", [*TINY, "26b_a4b", "31b"])
def test_flops_of_weights_are_those_of_the_model(name):
    """One token sees itself: a model counts half a key forwards three times, the kernels one key 1 + 3.5 times."""
    tried = dataclasses.replace(job(name, ONE, rows=1, length=1), remat="none")
    cfg = tried.cfg
    pairs = sum(layers * cfg.num_attention_heads * cfg.head_size(kind) for _, kind, layers in tried.layer_kinds)
    assert sum(n for _, kind, n in tried.layer_kinds if kind in KINDS) == cfg.num_hidden_layers
    expected = flops_per_token(cfg, 1) + 4 * pairs * (4.5 - 1.5)
    assert work.workload(tried).flops == pytest.approx(expected)


def test_flops_grow_with_recomputation_and_split_over_devices():
    whole = work.workload(job(sizes=ONE, remat="none")).flops
    assert 1.28 < work.workload(job(sizes=ONE)).flops / whole < 1.34
    for sizes in ((1, 64, 1, 1, 1), (1, 16, 1, 1, 4), (8, 8, 1, 1, 1), (4, 4, 1, 1, 4)):
        assert work.workload(job(sizes=sizes, remat="none")).flops == pytest.approx(whole / 64), sizes


def test_traffic_of_fsdp():
    """Weights are gathered twice and their gradients scattered once, bfloat16; the loss sends hidden states round."""
    tried = job(remat="full")
    gathered = sum(s.used_elements * s.layers for s in tried.shares if s.in_stack and s.name.endswith(".w"))
    hidden = 64 * tried.tokens * tried.cfg.hidden_size
    wire = work.workload(tried).wire_bytes
    assert wire["all-gather", ("fsdp",)] == pytest.approx(63 / 64 * 2 * (2 * gathered + hidden))
    assert wire["reduce-scatter", ("fsdp",)] == pytest.approx(63 / 64 * 2 * (gathered + hidden))


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [
        ((8, 8, 1, 1, 1), {("all-reduce", ("data",))}),
        ((1, 16, 1, 1, 4), {("all-reduce", ("tensor",))}),
        ((1, 16, 1, 4, 1), {("collective-permute", ("context",)), ("all-gather", ("context",))}),
        ((1, 8, 8, 1, 1), {("all-gather", ("expert",)), ("reduce-scatter", ("expert",))}),
        ((1, 4, 16, 1, 1), {("all-to-all", ("expert",))}),
    ],
)
def test_each_axis_has_its_collectives(sizes, kinds):
    name = "26b_a4b" if sizes[2] > 1 else "31b"
    assert kinds <= set(work.workload(job(name, sizes)).wire_bytes)


@pytest.mark.parametrize("base", [None, "w4a16"])
@pytest.mark.parametrize("name", ["tiny_e2b", "tiny_26b_a4b"])
def test_shares_of_adapters_and_codes_are_those_of_the_shardings(name, base):
    cfg, sizes, config = ModelConfig.variant(name), (1, 2, 2, 1, 2), LoraConfig(("all",), rank=4, base=base)
    sizes = (2, 2, 1, 1, 2) if not cfg.num_experts else sizes
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    placed = sharding.parameter_shardings(mesh)
    found = {share.name: share for share in shares.shares(cfg, sizes, config)}
    model = adapted_shapes(abstract(cfg, "bfloat16"), config)
    whole = {share.name: share for share in shares.shares(cfg, sizes)}
    for key, variable in variables(model).items():
        assert found[key].stored == placed(key, variable).shard_shape(variable.shape), key
        assert (found[key].itemsize or 2) == variable.dtype.itemsize, key
        assert found[key].trainable == (".adapter." in key), key
        if key in whole:  # decoded where it is used
            assert found[key].used == whole[key].used, key
            assert bool(found[key].per_byte) == (variable.dtype == "uint8"), key
    moving = set(trainable_names(model, ()))
    assert {share.name for share in found.values() if share.trainable} == moving
    tried = Job(cfg, "lora", sizes, 8, 64, lora=config)
    assert tried.trained == {key: v.get_value().size for key, v in variables(model).items() if key in moving}


def test_flops_of_adapters_are_those_of_the_model():
    """Beside frozen weights: two passes and not three, whose adapters add three; nothing for the table and lookups."""
    for name in ("tiny_e2b", "31b", "26b_a4b"):
        tried = dataclasses.replace(job(name, ONE, rows=1, length=1, program="lora", lora=LoraConfig()), remat="none")
        cfg = tried.cfg
        pairs = sum(layers * cfg.num_attention_heads * cfg.head_size(kind) for _, kind, layers in tried.layer_kinds)
        # The convention lets the gradient pass all products; that of the per-layer inputs stops at the frozen projection.
        stopped = 2 * cfg.hidden_size * tried.per_layer_width
        expected = flops_per_token(cfg, 1, tried.trained) + 4 * pairs * (4.5 - 1.5) - stopped
        assert work.workload(tried).flops == pytest.approx(expected), name
        experts = LoraConfig(("experts",))
        if cfg.num_experts:  # added to the weights: their gradients are made, and those sums
            more = dataclasses.replace(tried, lora=experts)
            rows = 6 * cfg.top_k_experts * cfg.hidden_size * cfg.moe_intermediate_size * cfg.num_hidden_layers
            sums = (
                6 * experts.rank * sum(s.elements for s in more.shares if ".experts." in s.name and s.name[-2:] == ".w")
            )
            none = dataclasses.replace(tried, lora=LoraConfig(("router",)))
            router = 6 * sum(s.elements for s in none.shares if s.is_adapter)
            assert work.workload(more).flops - work.workload(none).flops == pytest.approx(rows + sums - router)


def test_activations_of_several_rows_are_no_scores():
    """Seen in a compiled step of E2B, whose 8 heads of 512 are as wide as 4,096 tokens are many."""
    tried = job("e2b", (1, 4, 1, 1, 1), rows=8, length=4096)
    taken = [checks._is_activation(hlo.Shape("bf16", dims), tried) for dims in ((2, 4096, 12288), (4096, 1, 12288))]
    assert taken == [True, True]
    assert checks._is_activation(hlo.Shape("f32", (4096, 4096)), job(rows=64, length=4096))  # 16 key heads of 256, 31B
    for dims in ((2, 8, 4096, 4096), (2, 2, 4096, 4096), (3, 4096, 4096)):
        assert not checks._is_activation(hlo.Shape("bf16", dims), tried), dims


def test_footprint_of_adapters():
    """No moments and gradients of the base; its codes take 4.5 bits where bfloat16 takes 16."""
    fields: dict = dict(program="lora", param_dtype="bfloat16", sizes=(1, 4, 1, 1, 1))
    floats, codes = (footprint.footprint(job(**fields, lora=LoraConfig(base=base))) for base in (None, "w4a16"))
    full = footprint.footprint(job(param_dtype="bfloat16", sizes=(1, 4, 1, 1, 1)))
    assert floats["base"] == pytest.approx(full["parameters"], rel=1e-6)
    assert 4.5 / 16 < codes["base"] / floats["base"] < 0.36  # the token table stays bfloat16
    assert floats["optimizer"] == pytest.approx(2 * floats["adapters"])
    assert floats["gradients"] <= floats["adapters"] < 0.05 * floats["base"]
    assert sum(codes.values()) < sum(floats.values()) < sum(full.values())


def test_footprint_is_explicit():
    parts = footprint.footprint(job())
    assert parts["parameters"] == shares.resting_bytes(job().cfg, job().sizes, 4)
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-3)  # layer scalars are not trained
    assert parts["layer inputs"] == 60 * 8192 * 5376 * 2
    half = footprint.footprint(job(first_moment="bfloat16"))
    assert half["optimizer"] == pytest.approx(1.5 * parts["parameters"], rel=0.01)


def test_footprint_goes_the_right_way():
    def total(**fields):
        return sum(footprint.footprint(dataclasses.replace(job(), **fields)).values())

    assert total(rows=128) > total()
    assert total(rows=128, grad_accum=2) < total(rows=128)
    assert total(remat="none") > total(remat="save_projections") > total()
    assert total(teacher=True, program="qat") > total()
    assert total(sizes=(1, 16, 1, 4, 1)) < total(sizes=(1, 16, 1, 1, 1), rows=16)
    assert total(sizes=(1, 32, 1, 1, 2)) > 0


def test_every_remat_policy_is_known():
    assert set(footprint.SAVED) == set(work.PASSES) == set(REMAT)
    with pytest.raises(ValueError, match="remat is one of"):
        footprint.footprint(job(remat="some"))


def test_decode_reads_weights_and_cache_once():
    tried = job("31b", (1, 1, 1, 1, 8), rows=1, length=262144, program="decode")
    result = estimate(tried, topology("v6e:2x4"), flops_per_token(tried.cfg, 262144) / 3)
    assert result.fits
    assert result.roofline.binding == "memory"
    parts = footprint.footprint(tried)
    assert result.roofline.memory == pytest.approx((parts["parameters"] + parts["caches"]) / 1638e9, rel=0.1)


def test_prefill_holds_caches():
    tried = job("31b", (1, 1, 1, 16, 1), rows=1, length=262144, program="prefill")
    parts = footprint.footprint(tried)
    numbers = 10 * 262144 / 16 * 4 * 640 + 2 * 50 * 1024 / 16 * 16 * 256
    assert parts["caches"] == pytest.approx(2 * numbers, rel=0.01)
    assert "optimizer" not in parts
    assert "gradients" not in parts


def test_meshes_are_legal():
    cfg = ModelConfig.variant("e2b")
    found = meshes(cfg, 16, 1, "sft")
    assert len(found) == len(set(found))
    for sizes in found:
        assert math.prod(sizes) == 16
        assert sizes[2] == 1, "no experts"
        assert sizes[4] <= 8, "8 query heads"
    assert (1, 16, 1, 1, 1) in found
    assert all(sizes[0] % 2 == 0 for sizes in meshes(cfg, 16, 2, "sft"))
    assert all(sizes[1] == 1 for sizes in meshes(cfg, 16, 1, "decode"))


def test_sweep_ranks_what_fits_in_time():
    where, tried = topology("tpu7x:4x4x4"), job("26b_a4b", ONE)
    started = time.perf_counter()
    found = sweep(tried, where, flops_per_token(tried.cfg, 8192))
    assert time.perf_counter() - started < 20  # 2.2 s of one core; tests share it
    assert len(found) > 50
    assert all(each.fits and math.prod(each.job.sizes) == 128 for each in found)
    bounds = [round(each.roofline.mfu_bound, 4) for each in found]
    assert bounds == sorted(bounds, reverse=True)
    assert 0.45 < bounds[0] < 0.8
    text = report.ranked(found)
    assert len(text.splitlines()) == 12
    fixed = sweep(tried, where, flops_per_token(tried.cfg, 8192), batches=[256])
    assert {each.job.rows for each in fixed} == {256}


def test_too_large_is_told_what_would_fit():
    where, tried = topology("v5e:4x4"), job("e4b", (1, 16, 1, 1, 1), rows=128, remat="save_projections")
    flops = flops_per_token(tried.cfg, 8192)
    result = estimate(tried, where, flops)
    assert not result.fits
    assert "too much by" in report.estimated(result, where)
    found = alternatives(tried, where, flops)
    assert all(each.total <= 15.75 * GiB for _, each in found)
    settings = " ".join(name for name, _ in found)
    assert all(
        word in settings for word in ("plan.remat=full", "plan.grad_accum=", "plan.batch_size=", "plan.topology=")
    )
    assert "would fit" in report.fitting(found)
    impossible = job("31b", (1, 1, 1, 1, 1), rows=1)
    assert "no configuration" in report.fitting([])
    assert all("topology" in name for name, _ in alternatives(impossible, topology("v5e:1x1"), flops))

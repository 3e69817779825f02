"""Sizes on slices: every config with a slice reads, sets what was planned, and fits; docs/slices.md says what is known."""

import json

import pytest
from conftest import PROJECT

from benchmarks import slices as pages
from gemma4_jax.chips import topology
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.mesh_choice import decoding_axes, training_axes
from gemma4_jax.quant.policies import POLICIES
from gemma4_jax.sharding import MeshConfig
from launch.overrides import read_command_line
from launch.run import read_run
from launch.settings import PlanRun, QatRun, SampleRun, TrainRun
from launch.slices import JOBS, Job, find

GIVEN = ["--config.model.path=ckpt", "--config.data.paths=rows.jsonl"]
VARIANTS = ("e2b", "e4b", "26b_a4b", "31b")
COMPILED = json.loads(pages.RESULTS.read_text())


def config(spec: str, *more: str):
    return read_run(read_command_line([f"--config={PROJECT / 'configs' / spec}", *more]))


def name(job: Job) -> str:
    return f"{job.step}-{job.variant}-{job.slice}" + (f"-{job.base}" if job.base else "")


def test_every_step_and_variant_has_a_slice():
    assert {(job.step, job.variant) for job in JOBS} == {
        (s, v) for s in ("sft", "qat", "lora", "decode") for v in VARIANTS
    }
    assert {(job.variant, job.base) for job in JOBS if job.step == "lora"} == {
        (v, b) for b in (None, "w4a16") for v in VARIANTS
    }


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_the_mesh_written_down_is_the_one_that_is_chosen(job):
    cfg, devices = ModelConfig.variant(job.variant), topology(job.slice).devices
    if job.step == "decode":
        chosen = decoding_axes(cfg, MeshConfig(), devices, job.rows * job.length)
    else:
        chosen = training_axes(cfg, MeshConfig(), devices, job.rows, job.length)
    assert dict(job.mesh) == {axis: size for axis, size in chosen.items() if size > 1}


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_what_was_planned_fits(job):
    known = pages.found(job, COMPILED)
    assert known.mesh == dict(job.mesh)
    assert known.total <= known.usable
    assert 0 < known.fastest <= known.slowest


@pytest.mark.parametrize("job", [job for job in JOBS if job.step == "sft"], ids=name)
def test_training_configs(job):
    runs = [
        config(f"sft_chat.py:{job.variant},{job.slice}", *GIVEN),
        config(f"pretrain.py:{job.variant},{job.slice}", *GIVEN[1:]),
    ]
    for run in runs:
        assert isinstance(run, TrainRun)
        check(run, job)


@pytest.mark.parametrize("job", [job for job in JOBS if job.step == "qat"], ids=name)
def test_qat_configs_of_every_policy(job):
    for policy in POLICIES:
        run = config(f"qat.py:{job.variant},{policy},{job.slice}", *GIVEN)
        assert isinstance(run, QatRun)
        assert run.quant.policy == policy
        check(run, job)


@pytest.mark.parametrize("job", [job for job in JOBS if job.step == "lora"], ids=name)
def test_lora_configs(job):
    run = config(f"lora.py:{job.variant},{job.base or 'none'},{job.slice}", *GIVEN)
    assert isinstance(run, TrainRun)
    assert run.lora is not None
    assert (run.lora.base, run.model.param_dtype) == (job.base, "bfloat16")
    planned = config(f"plan.py:{job.variant}", *(f"--config.{option}" for option in job.options))
    assert isinstance(planned, PlanRun)
    assert (planned.lora, planned.model.param_dtype, planned.plan.remat) == (run.lora, "bfloat16", run.train.remat)
    check(run, job)


def check(run: TrainRun, job: Job) -> None:
    assert (run.data.batch_size, run.data.seq_len, run.train.remat) == (job.rows, job.length, "full")
    assert {axis: size for axis, size in run.mesh.sizes().items() if size} == dict(job.mesh)
    assert run.optim.first_moment == job.first_moment


@pytest.mark.parametrize("job", [job for job in JOBS if job.step == "decode"], ids=name)
def test_sampling_configs(job):
    run = config(f"sample.py:{job.variant},{job.slice}", GIVEN[0], "--config.prompts.text=hi")
    assert isinstance(run, SampleRun)
    assert (run.sample.batch_size, run.sample.max_length) == (job.rows, job.length)
    assert {axis: size for axis, size in run.mesh.sizes().items() if size} == dict(job.mesh)


def test_a_slice_without_sizes_names_those_that_have_some():
    with pytest.raises(UserError, match=r"no proven sizes for sft of 31b on 'v6e:4x4'.*v6e:8x8"):
        find("sft", "31b", "v6e:4x4")
    with pytest.raises(
        UserError, match=r"no proven sizes for lora of 31b with its base as int8 on 'v6e:2x4'; There are none"
    ):
        config("lora.py:31b,int8,v6e:2x4", *GIVEN)
    with pytest.raises(UserError, match=r"takes VARIANT,BASE,SLICE"):
        config("lora.py:31b,w4a16,v6e:2x2,x", *GIVEN)
    with pytest.raises(UserError, match=r"takes VARIANT,POLICY,SLICE"):
        config("qat.py:e2b,q4_0,v6e:2x4,x", *GIVEN)


def test_the_page_is_current():
    wanted = pages.page(COMPILED)
    assert pages.PAGE.read_text() == wanted, "docs/slices.md is not what is known: python -m benchmarks.slices"

"""`task=plan`: does the step fit, and how fast could it be, on devices that are not here?"""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gemma4_jax.chips import Topology, topology
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.kernels.cross_entropy import loss_chunks
from gemma4_jax.kernels.expert_routes import block_rows, largest_block
from gemma4_jax.mesh_choice import decoding_axes, training_axes
from gemma4_jax.model.lora import adapted_shapes
from gemma4_jax.model.transformer import abstract as abstract_parameters
from gemma4_jax.plan import absent, checks, costs, hlo, report
from gemma4_jax.plan.estimate import alternatives, estimate, sweep
from gemma4_jax.plan.footprint import footprint, tower_bytes
from gemma4_jax.plan.job import Job
from gemma4_jax.plan.network import places_of
from gemma4_jax.plan.roofline import Roofline, roofline
from gemma4_jax.sharding import AXES, check_batch, make_mesh, shape_of
from gemma4_jax.train.optimizer import OptimConfig
from gemma4_jax.train.throughput import flops_per_token, forward_flops
from launch import abstract
from launch.models import model_config
from launch.settings import PlanRun

Write = Callable[[str], None]

ARGUMENTS = ("parameters", "base", "adapters", "optimizer", "teacher", "caches", "batch")
"""Parts of `footprint` that a program gets; its other parts it makes."""


def run_plan(run: PlanRun, write: Write = print) -> None:
    """Prints the plan; UserError (exit code 1), with the nearest configurations that fit, if this one does not."""
    cfg, where = model_config(run.model), topology(run.plan.topology)
    if run.plan.batch_size % run.plan.grad_accum:
        raise UserError(f"plan.grad_accum={run.plan.grad_accum} does not divide plan.batch_size={run.plan.batch_size}.")
    job = job_of(run, cfg, where)
    if run.plan.parameters:
        axes = AbstractMesh(job.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        model = abstract_parameters(cfg, run.model.param_dtype)
        write(report.parameters(model if job.lora is None else adapted_shapes(model, job.lora), axes))
    write(report.attention(job, where.chip.platform))
    if job.whole is not None:
        write(
            f"towers: they rest as they are, {report.gib(tower_bytes(job))} GiB a device; what they compute on pictures and sounds "
            "is not in this plan, neither its FLOPs nor its memory"
        )
    if run.plan.mode == "estimate":
        _estimate(run, job, where, write)
    else:
        _compile(run, job, where, write)


def job_of(run: PlanRun, cfg: ModelConfig, where: Topology) -> Job:
    """What is to be planned, with the mesh of the settings or the one that suits the step."""
    plan, devices = run.plan, run.mesh.devices or where.devices * run.mesh.slices
    if plan.step == "decode":
        axes = decoding_axes(cfg, run.mesh, devices, plan.batch_size * plan.seq_len)
    else:
        axes = training_axes(cfg, run.mesh, devices, plan.batch_size // plan.grad_accum, plan.seq_len)
    return Job(
        cfg.text_only(),
        plan.step,
        tuple(axes[name] for name in AXES),
        plan.batch_size,
        plan.seq_len,
        param_dtype=run.model.param_dtype,
        compute_dtype=run.model.dtype,
        remat=plan.remat,
        grad_accum=plan.grad_accum,
        first_moment=plan.first_moment,
        teacher=plan.step == "qat" and run.quant.distill_weight > 0,
        lora=run.lora if plan.step == "lora" else None,
        whole=cfg if cfg.is_multimodal else None,
    )


def useful_flops(job: Job) -> float:
    """Model FLOPs of one token of the step: of training those of the log line, teacher included; of prefill no head."""
    if job.program == "decode":
        return forward_flops(job.cfg, job.length)
    if not job.trains:
        return forward_flops(job.cfg, job.length / 2, head=False)
    return flops_per_token(job.cfg, job.length, job.trained) + job.teacher * forward_flops(job.cfg, job.length / 2)


def _estimate(run: PlanRun, job: Job, where: Topology, write: Write) -> None:
    slices, headroom = run.mesh.slices, run.plan.headroom
    found = estimate(job, where, useful_flops(job), slices=slices)
    write(f"{run.plan.step} on {where.name}, estimated\n\n{report.estimated(found, where)}")
    ranked = sweep(job, where, useful_flops(job), slices=slices, headroom=headroom)
    write(f"\nmeshes and batches that fit, best first\n{report.ranked(ranked)}")
    _save(run, {"memory": found.memory, "total": found.total, "mfu_bound": found.roofline.mfu_bound})
    if found.total > (1 - headroom) * where.chip.device_usable_hbm:
        raise _too_big(run, job, where, report.gib(found.total))


def _compile(run: PlanRun, job: Job, where: Topology, write: Write) -> None:
    axes: dict[str, int] = dict(zip(AXES, job.sizes, strict=True))
    mesh = make_mesh(axes, absent.devices(where, run.mesh.slices)[: run.mesh.devices], run.mesh.slices)
    if run.plan.step != "decode":
        check_batch(mesh, run.plan.batch_size // run.plan.grad_accum, run.plan.seq_len, "plan")
    guess = estimate(job, where, useful_flops(job), slices=run.mesh.slices)
    write(f"{run.plan.step} on {where.name}, mesh {shape_of(mesh)}; estimated {report.gib(guess.total)} GiB a device")
    started = time.perf_counter()
    lowered = lower(run, job.cfg, mesh)
    write(
        f"traced in {time.perf_counter() - started:.0f} s; compiling for {where.name}, which takes minutes for a large model"
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_big(run, job, where, _wanted(str(error))) from None
    seconds, text = time.perf_counter() - started, compiled.as_text() or ""
    if run.plan.hlo:
        Path(run.plan.hlo).write_text(text)
    module = hlo.parse(text)
    totals = costs.totals(module, axes, trips=_trips(job, mesh))
    found = roofline(totals, places_of(where, list(mesh.devices.flat)), _tokens(job) * useful_flops(job))
    parts = _memory(job, compiled.memory_analysis())
    faults = checks.faults(module, job)
    write(f"compiled in {seconds:.0f} s\n\n{report.compiled(parts, totals, found, where)}")
    write("\n" + "\n".join(f"{what}: {'; '.join(each) or 'none'}" for what, each in faults.items()))
    listed = [f"{what}: {each}" for what, all_of in faults.items() for each in all_of]
    _save(run, _numbers(job, parts, guess.total, totals, found, seconds, listed, len(text)))
    if sum(parts.values()) > (1 - run.plan.headroom) * where.chip.device_usable_hbm:
        raise _too_big(run, job, where, report.gib(sum(parts.values())))


def _tokens(job: Job) -> int:
    """Tokens of a step; a decode program's loop over steps counts once."""
    return job.rows * (1 if job.program == "decode" else job.length)


def _trips(job: Job, mesh: Mesh) -> dict[str, int]:
    """How often the loops run that end by data: every token trained, experts evenly loaded."""
    rows = job.tokens * job.cfg.top_k_experts
    ranks, blocks = job.devices("expert"), 1
    if ranks > 1:
        parts = ranks if job.experts_route == "exchange" else 1
        largest = largest_block(job.cfg.num_experts // ranks) // parts
        blocks = -(-rows // (parts * block_rows(rows // parts, rows * ranks, largest)))
    with jax.set_mesh(mesh):
        return {"loss": loss_chunks((job.rows // job.grad_accum, job.length), job.cfg.vocab_size), "experts": blocks}


def _memory(job: Job, analysis: Any) -> dict[str, float]:
    """Bytes of a device by what they are for. Arguments are known exactly; the rest is what the compiler adds at its peak.

    Towers lie beside the program, which is of text.
    """
    parts = {name: size for name, size in footprint(job).items() if name in ARGUMENTS}
    # The footprint counts whole tiles where the compiler may choose a layout without padding.
    scale = min(1.0, analysis.argument_size_in_bytes / sum(parts.values()))
    parts = {name: scale * size for name, size in parts.items()}
    parts["other arguments"] = analysis.argument_size_in_bytes - sum(parts.values())
    working = analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
    if job.trains:
        trained = parts["adapters"] if job.lora is not None else parts["parameters"] * 4 / job.param_bytes
        parts["gradients"] = min(working, trained)
        working -= parts["gradients"]
    return {**parts, "towers": tower_bytes(job), "activations and working memory": working}


def _wanted(message: str) -> str:
    """The compiler's figure in an out-of-memory message."""
    found = re.search(r"Used ([\d.]+)G of", message)
    return found[1] if found else "more"


def _too_big(run: PlanRun, job: Job, where: Topology, wanted: str) -> UserError:
    options = alternatives(job, where, useful_flops(job), slices=run.mesh.slices, headroom=run.plan.headroom)
    limit = report.gib((1 - run.plan.headroom) * where.chip.device_usable_hbm)
    listed = "; ".join(f"{settings} ({report.gib(each.total)} GiB)" for settings, each in options)
    return UserError(
        f"The {job.program} step needs {wanted} GiB a device and {where.name} has {limit}; estimated to fit: "
        f"{listed or 'nothing near'}."
    )


def _numbers(
    job: Job,
    parts: Mapping[str, float],
    estimated: float,
    totals: costs.Totals,
    found: Roofline,
    seconds: float,
    faults: list[str],
    characters: int,
) -> dict[str, Any]:
    """What a program wants to know of the plan."""
    return {
        "mesh": dict(zip(AXES, job.sizes, strict=True)),
        "memory": dict(parts),
        "total": sum(parts.values()),
        "estimated": estimated,
        "flops": totals.flops,
        "model_flops": found.model_flops,
        "hbm_bytes": totals.hbm_bytes,
        "wire_bytes": {f"{kind} {report.along(axes)}": size for (kind, axes), size in totals.wire_bytes.items()},
        "kernels": {name: kernel.calls for name, kernel in totals.kernels.items()},
        "times": found.times,
        "binding": found.binding,
        "mfu_bound": found.mfu_bound,
        "mfu_serial": found.mfu_serial,
        "compile_seconds": seconds,
        "hlo_characters": characters,
        "faults": faults,
    }


def _save(run: PlanRun, numbers: Mapping[str, Any]) -> None:
    if run.plan.output:
        Path(run.plan.output).write_text(json.dumps(numbers, indent=1) + "\n")


def lower(run: PlanRun, cfg: ModelConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step of the settings, traced for the mesh."""
    plan = run.plan
    given: dict[str, Any] = {"rows": plan.batch_size, "length": plan.seq_len}
    given |= {"dtype": run.model.param_dtype, "compute_dtype": run.model.dtype}
    if plan.step == "prefill":
        return abstract.lowered_prefill(cfg, mesh, **given)
    if plan.step == "decode":
        return abstract.lowered_decode(cfg, mesh, **given)
    return abstract.lowered_training(
        cfg,
        mesh,
        **given,
        optim=OptimConfig(first_moment=plan.first_moment),
        remat=plan.remat,
        grad_accum=plan.grad_accum,
        quant=run.quant if plan.step == "qat" else None,
        lora=run.lora if plan.step == "lora" else None,
    )

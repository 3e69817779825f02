"""docs/slices.md, from `launch.slices.JOBS` and what was compiled: `python -m benchmarks.slices`.

A job whose command stands in results/tpu_aot.json is shown as the compiler found it; the others as `plan.mode=estimate` does.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gemma4_jax.chips import topology
from gemma4_jax.plan.estimate import estimate
from gemma4_jax.tables import percent
from gemma4_jax.train.metrics import si
from launch import plan
from launch.models import model_config
from launch.overrides import read_command_line
from launch.run import read_run
from launch.settings import PlanRun
from launch.slices import JOBS, Job

RESULTS = Path(__file__).parent / "results" / "tpu_aot.json"
PAGE = Path(__file__).parents[1] / "docs" / "slices.md"
GiB = 2**30

NAMES = {
    "sft": "training (SFT, pretraining)",
    "qat": "QAT with its teacher",
    "lora": "LoRA and QLoRA",
    "decode": "sampling",
}
CONFIGS = {
    "sft": "`configs/sft_chat.py:VARIANT,SLICE`, `configs/pretrain.py:VARIANT,SLICE`",
    "qat": "`configs/qat.py:VARIANT,POLICY,SLICE`",
    "lora": "`configs/lora.py:VARIANT,BASE,SLICE` (rank 16 in attention and dense feed-forward layers)",
    "decode": "`configs/sample.py:VARIANT,SLICE`",
}

HEAD = """# Models on slices

What each config sets when a slice stands behind its variant, and what the plan says about it. This page is written by
`python -m benchmarks.slices` from [benchmarks/results/tpu_aot.json](../benchmarks/results/tpu_aot.json); `compiled` rows are the
very step, compiled with the compiler of that chip, `estimated` ones are formulas.

- **GiB a device**: peak of one JAX device (tpu7x shows a chip as two), and what a program may take. bfloat16 compute; training
  has float32 weights, gradients and Adam moments, and recomputes layers (`remat=full`). Of LoRA the weights are bfloat16 or codes
  and stay; adapters with their gradients and moments are float32.
- **step**: seconds from perfect overlap of arithmetic, memory and network to none at all, everything at its published peak. No
  real step was measured in this project, for want of a TPU: expect the upper end, and more for input and logging.
- **tokens/s**: of all devices together, for the same two ends. Of sampling, tokens of all rows.
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a plan says."""

    how: str
    mesh: dict[str, int]
    total: float
    usable: float
    fastest: float
    slowest: float
    mfu: float


def found(job: Job, compiled: dict[str, Any]) -> Found:
    """The compiled plan of a job, else its estimate."""
    where = topology(job.slice)
    usable = where.chip.device_usable_hbm
    numbers = compiled.get(job.command, {})
    if "total" in numbers:
        times = numbers["times"].values()
        mesh = {axis: size for axis, size in numbers["mesh"].items() if size > 1}
        return Found("compiled", mesh, numbers["total"], usable, max(times), sum(times), numbers["mfu_bound"])
    arguments = [word for word in job.command.split() if word.startswith("--")]
    run = read_run(read_command_line([*arguments, "--config.plan.mode=estimate"]))
    assert isinstance(run, PlanRun)
    planned = plan.job_of(run, model_config(run.model), where)
    guess = estimate(planned, where, plan.useful_flops(planned))
    line = guess.roofline
    mesh = {axis: size for axis, size in guess.mesh.items() if size > 1}
    return Found("estimated", mesh, guess.total, usable, line.step_seconds, line.serial_seconds, line.mfu_bound)


def page(compiled: dict[str, Any]) -> str:
    """The whole text."""
    lines = [HEAD]
    for step, name in NAMES.items():
        jobs = [job for job in JOBS if job.step == step]
        lines += [f"## {name[0].upper()}{name[1:]}", "", f"With {CONFIGS[step]}.", ""]
        sizes = "rows x slots" if step == "decode" else "rows x tokens"
        head = ("variant", "slice", "mesh", sizes, "GiB a device", "step, s", "tokens/s", "MFU at most", "from")
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_cells(job, found(job, compiled))) + " |" for job in jobs]
        lines.append("")
    lines += ["## Commands", ""]
    lines += [f"- {job.step} of {_variant(job)} on {job.slice}: `{job.command}`" for job in JOBS]
    return "\n".join(lines) + "\n"


def _cells(job: Job, it: Found) -> tuple[str, ...]:
    tokens = job.rows * (1 if job.step == "decode" else job.length)
    mesh = " x ".join(f"{axis} {size}" for axis, size in it.mesh.items()) or "one device"
    if job.first_moment != "float32":
        mesh += f", first moment {job.first_moment}"
    return (
        _variant(job),
        job.slice,
        mesh,
        f"{job.rows:,} x {job.length:,}",
        f"{it.total / GiB:.1f} of {it.usable / GiB:.1f}" + (" **too much**" if it.total > it.usable else ""),
        _range(f"{it.fastest:.3g}", f"{it.slowest:.3g}"),
        _range(si(tokens / it.slowest), si(tokens / it.fastest)),
        "" if job.step == "decode" else percent(it.mfu),
        it.how,
    )


def _variant(job: Job) -> str:
    return job.variant + (f", base {job.base}" if job.base else "")


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    print(PAGE)


if __name__ == "__main__":
    main()

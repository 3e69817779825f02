"""Sizes of jobs on slices one can rent: what `configs/NAME.py:VARIANT,SLICE` sets, and the command that plans the same step.

`benchmarks/aot.py` compiles these very steps for their slices; docs/slices.md is the table of what it found, and of estimates
where nothing is compiled yet. The mesh is the one that is chosen when the config names none (`gemma4_jax.mesh_choice`), written
down here so that a config says what it runs.
"""

import dataclasses
from typing import Any, Literal

from gemma4_jax.errors import UserError, did_you_mean

Step = Literal["sft", "qat", "lora", "decode"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A step on a slice. Of decode, `rows` are answers at a time and `length` the slots of the cache."""

    step: Step
    variant: str
    slice: str
    rows: int
    length: int
    mesh: tuple[tuple[str, int], ...]  # axes longer than 1
    first_moment: str = "float32"
    base: str | None = None  # of lora: the policy whose codes hold the base; none: bfloat16

    @property
    def options(self) -> tuple[str, ...]:
        """Settings of configs/plan.py for the same step, in the order of benchmarks/aot.py."""
        step = () if self.step == "sft" else (f"plan.step={self.step}",)
        sizes = (f"plan.topology={self.slice}", f"plan.batch_size={self.rows}", f"plan.seq_len={self.length}")
        moment = () if self.first_moment == "float32" else (f"plan.first_moment={self.first_moment}",)
        adapters = ("model.param_dtype=bfloat16",) if self.step == "lora" else ()
        base = () if self.base is None else (f"lora.base={self.base}",)
        return (*step, *sizes) if self.step == "decode" else (*sizes, *step, *moment, *adapters, *base)

    @property
    def command(self) -> str:
        """What plans it."""
        return " ".join(
            (f"python -m launch.run --config=configs/plan.py:{self.variant}", *(f"--config.{x}" for x in self.options))
        )


JOBS = (
    # The first of each step and variant is what the configs' docstrings recommend.
    Job("sft", "e2b", "v6e:2x4", 8, 8192, (("fsdp", 8),)),
    Job("sft", "e2b", "v5e:4x4", 16, 8192, (("fsdp", 16),)),
    Job("sft", "e4b", "v6e:4x4", 16, 8192, (("fsdp", 16),)),
    Job("sft", "e4b", "h100:8", 8, 8192, (("fsdp", 8),)),
    Job("sft", "26b_a4b", "v6e:8x8", 64, 8192, (("fsdp", 16), ("expert", 4))),
    Job("sft", "26b_a4b", "v5p:4x4x4", 64, 8192, (("fsdp", 16), ("expert", 4))),
    Job("sft", "26b_a4b", "tpu7x:4x4x4", 512, 8192, (("fsdp", 64), ("expert", 2))),
    Job("sft", "26b_a4b", "h100:8", 8, 8192, (("fsdp", 2), ("expert", 4)), first_moment="bfloat16"),
    Job("sft", "31b", "v6e:8x8", 64, 8192, (("fsdp", 64),)),
    Job("sft", "31b", "v5p:4x4x4", 64, 8192, (("fsdp", 64),)),
    Job("sft", "31b", "tpu7x:4x4x4", 256, 8192, (("fsdp", 128),)),
    Job("qat", "e2b", "v6e:2x4", 8, 8192, (("fsdp", 8),)),
    Job("qat", "e4b", "v6e:4x4", 16, 8192, (("fsdp", 16),)),
    Job("qat", "26b_a4b", "v6e:8x8", 64, 8192, (("fsdp", 16), ("expert", 4))),
    Job("qat", "31b", "v6e:8x8", 64, 8192, (("fsdp", 64),)),
    Job("lora", "e2b", "v5e:2x2", 8, 4096, (("fsdp", 4),)),
    Job("lora", "e2b", "v5e:2x2", 8, 4096, (("fsdp", 4),), base="w4a16"),
    Job("lora", "e4b", "v6e:2x2", 8, 8192, (("fsdp", 4),)),
    Job("lora", "e4b", "v5e:2x2", 4, 4096, (("fsdp", 4),), base="w4a16"),
    Job("lora", "26b_a4b", "v6e:2x4", 8, 8192, (("fsdp", 2), ("expert", 4))),
    Job("lora", "26b_a4b", "v6e:2x2", 4, 4096, (("expert", 4),), base="w4a16"),
    Job("lora", "31b", "v6e:2x4", 8, 8192, (("fsdp", 8),)),
    Job("lora", "31b", "v6e:2x2", 4, 4096, (("fsdp", 4),), base="w4a16"),
    Job("decode", "e2b", "v5e:1x1", 1, 8192, ()),
    Job("decode", "e4b", "v6e:1x1", 1, 8192, ()),
    Job("decode", "26b_a4b", "v6e:2x4", 8, 32768, (("expert", 4), ("tensor", 2))),
    Job("decode", "31b", "v6e:2x4", 1, 262144, (("context", 2), ("tensor", 4))),
    Job("decode", "31b", "h100:8", 8, 32768, (("context", 2), ("tensor", 4))),
)


def find(step: Step, variant: str, slice_: str, base: str | None = None) -> Job:
    """The job of these names; UserError with those that are there."""
    known = {job.slice: job for job in JOBS if (job.step, job.variant, job.base) == (step, variant, base)}
    if slice_ not in known:
        of = variant if base is None else f"{variant} with its base as {base}"
        guess = did_you_mean(slice_, known) if known else "There are none."
        raise UserError(
            f"There are no proven sizes for {step} of {of} on {slice_!r}; {guess} "
            "Other slices: leave it out, set the sizes yourself, and ask configs/plan.py."
        )
    return known[slice_]


def set_sizes(config: Any, step: Step, variant: str, slice_: str, base: str | None = None) -> None:
    """Batch, length, mesh, remat and moments of the job in a config."""
    job = find(step, variant, slice_, base)
    for axis, size in job.mesh:
        config.mesh[axis] = size
    if step == "decode":
        config.sample.batch_size, config.sample.max_length = job.rows, job.length
        return
    config.data.batch_size, config.data.seq_len = job.rows, job.length
    config.train.remat = "full"
    config.optim.first_moment = job.first_moment

"""One frozen dataclass per task: exactly the sections that task reads, so a section it would ignore is an unknown key.

A config file starts from `defaults(task)` and sets what differs; `read` turns the result into the dataclass, once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ml_collections import ConfigDict

from gemma4_jax.chips import topology
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.pipeline import DataConfig
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.eval.exact_match import EvalConfig
from gemma4_jax.infer.generate import SampleConfig
from gemma4_jax.infer.prompts import PromptConfig
from gemma4_jax.media.frontend import MediaConfig
from gemma4_jax.model.lora import LoraConfig
from gemma4_jax.options import option
from gemma4_jax.quant.policies import PolicyName
from gemma4_jax.quant.policy import QuantConfig
from gemma4_jax.sharding import MeshConfig
from gemma4_jax.train.loop import Remat, TrainConfig
from gemma4_jax.train.optimizer import OptimConfig
from gemma4_jax.train.recorder import TrackConfig
from gemma4_jax.train.tracing import ProfileConfig
from launch import schema


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Which model: a variant with random weights, or a checkpoint."""

    NEEDS: ClassVar = ("variant or path",)

    variant: str | None = option(None, "e2b, e4b, 26b_a4b, 31b or one of their tiny_ twins, with random weights")
    path: str | None = option(
        None, "a checkpoint: a Hugging Face directory, one of our model directories, or a run's checkpoints"
    )
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "what layers compute in")
    param_dtype: Literal["float32", "bfloat16"] = option("float32", "what parameters are stored in")
    overrides: dict[str, Any] = option(factory=dict, help="ModelConfig fields of the variant to replace")
    text_only: bool = option(False, "leave out the vision and audio towers")
    base: str | None = option(None, "of adapters at path: where their base lies; none: where it lay in training")

    def __post_init__(self):
        if self.base is not None and self.path is None:
            raise UserError("config.model.base is the base of the adapters at config.model.path; set that too.")
        if (self.variant is None) == (self.path is None):
            given = "neither" if self.variant is None else "both; set one of them to none"
            raise UserError(f"config.model wants either variant or path, got {given}.")
        if self.path is not None and self.overrides:
            raise UserError("config.model.overrides changes a variant; the checkpoint at path has a config of its own.")
        if self.variant is not None:  # complains about a wrong variant or field before anything starts
            ModelConfig.variant(self.variant, **self.overrides)


@dataclasses.dataclass(frozen=True)
class MeasuredSection(ModelSection):
    """Which model is measured: a checkpoint, or none where `eval.answers` has the answers."""

    def __post_init__(self):
        if self.path is not None or self.variant is not None:
            super().__post_init__()


@dataclasses.dataclass(frozen=True)
class ConvertSection:
    """From which checkpoint to which; both kinds of directory are read."""

    source: str = option(help="checkpoint to read: a Hugging Face directory or one of our Orbax directories")
    target: str = option(help="directory to write; must not exist yet")
    format: Literal["hf", "orbax"] = option("hf", "what to write")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of the written tensors")
    max_shard_size: str = option("5GB", "largest safetensors file")
    text_only: bool = option(False, "leave out the vision and audio towers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What every task has."""

    task: str = option(help="which program")
    workdir: str | None = option(None, "directory for what the run writes; training resumes from it", may_change=True)
    seed: int = option(0, "of random weights and of sampling; data.seed orders the rows")


@dataclasses.dataclass(frozen=True)
class ProcessesSection:
    """The processes of one run, one a host: the same command on each, `index` apart. They find each other, then share `mesh`."""

    auto: bool | None = option(
        None, "look for the others (TPU slices, Slurm, Open MPI, GKE); none: join if there are any", may_change=True
    )
    coordinator: str | None = option(None, "HOST:PORT of process 0, where nobody finds them", may_change=True)
    count: int | None = option(None, "how many, with coordinator", may_change=True)
    index: int | None = option(None, "which one this is, 0 to count - 1, with coordinator", may_change=True)
    meet_seconds: int = option(300, "how long they wait for each other at the start", may_change=True)
    heartbeat_seconds: int = option(
        100, "a process not heard of for so long is dead, and ends the others", may_change=True
    )

    def __post_init__(self):
        given = [name for name in ("coordinator", "count", "index") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise UserError(
                f"config.processes wants coordinator, count and index together, got only {' and '.join(given)}."
            )
        if given and self.auto:
            raise UserError(
                "config.processes.auto finds the other processes itself; leave coordinator, count and index out."
            )
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise UserError(f"config.processes.index lies in 0..{self.count - 1}, got {self.index}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    """What both ways of training share."""

    mesh: MeshConfig = option(factory=MeshConfig, help="how devices share the work; none: chosen")
    processes: ProcessesSection = option(factory=ProcessesSection, help="several hosts")
    model: ModelSection = option(help="the model to start from")
    tokenizer: str | None = option(None, "tokenizer file; none: beside the checkpoint, else the embedded one")
    data: DataConfig = option(help="training rows")
    eval_data: DataConfig | None = option(None, "held-out rows; none: no evaluation")
    media: MediaConfig = option(factory=MediaConfig, help="how pictures, videos and sounds are read")
    lora: LoraConfig | None = option(None, "train adapters beside the weights; none: train the weights")
    optim: OptimConfig = option(factory=OptimConfig, help="optimizer and schedule")
    train: TrainConfig = option(factory=TrainConfig, help="the loop")
    track: TrackConfig = option(factory=TrackConfig, help="who else sees the run: TensorBoard, Weights & Biases")
    profile: ProfileConfig = option(factory=ProfileConfig, help="traces of single steps")

    def __post_init__(self):
        if self.lora is None:
            return
        if self.model.path is None:
            raise UserError(
                "config.lora trains adapters of a checkpoint, and config.model has none; set config.model.path."
            )
        if self.optim.train != OptimConfig().train:
            raise UserError("config.lora moves adapters alone, which are the decoder's; leave config.optim.train out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRun(TrainRun):
    """Train on chat or text: full fine-tuning with a masked loss."""

    task: Literal["sft"] = option("sft", "which program")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatRun(TrainRun):
    """Train with fake-quantised weights, distilled from the float model it starts from."""

    task: Literal["qat"] = option("qat", "which program")
    quant: QuantConfig = option(factory=QuantConfig, help="policy, distillation")

    def __post_init__(self):
        super().__post_init__()
        if self.lora is not None and self.quant.learn_scales:
            raise UserError(
                "config.lora moves adapters alone, and quant.learn_scales=true scales too; drop one of them."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRun(Run):
    """Generate answers to prompts."""

    task: Literal["sample"] = option("sample", "which program")
    mesh: MeshConfig = option(factory=MeshConfig, help="how devices share the work; none: chosen")
    model: ModelSection = option(help="the model that answers")
    tokenizer: str | None = option(None, "tokenizer file; none: beside the checkpoint, else the embedded one")
    prompts: PromptConfig = option(help="what to answer: exactly one of text, file and chat")
    media: MediaConfig = option(factory=MediaConfig, help="how pictures, videos and sounds are read")
    sample: SampleConfig = option(factory=SampleConfig, help="how to draw tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun(Run):
    """Measure a checkpoint on held-out rows: perplexity, exact match, tool calls."""

    task: Literal["eval"] = option("eval", "which program")
    mesh: MeshConfig = option(factory=MeshConfig, help="how devices share the work; none: chosen")
    model: MeasuredSection = option(factory=MeasuredSection, help="the model to measure")
    tokenizer: str | None = option(None, "tokenizer file; none: beside the checkpoint, else the embedded one")
    data: DataConfig = option(help="held-out rows")
    media: MediaConfig = option(factory=MediaConfig, help="how pictures, videos and sounds are read")
    eval: EvalConfig = option(factory=EvalConfig, help="what to measure")
    sample: SampleConfig = option(factory=SampleConfig, help="how to draw tokens of answers")

    def __post_init__(self):
        given = self.model.path is not None or self.model.variant is not None
        if given and self.eval.answers is not None:
            raise UserError("config.eval.answers is scored without a model; leave config.model out, or eval.answers.")
        if not given and self.eval.answers is None:
            raise UserError("config.model wants either variant or path, got neither.")
        if self.eval.against and self.sample.packed:
            raise UserError(
                "config.eval.against asks the float model too, which has no codes; leave config.sample.packed out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRun(Run):
    """Rewrite a checkpoint: Hugging Face safetensors to Orbax or back; memory holds the model once."""

    task: Literal["convert"] = option("convert", "which program")
    convert: ConvertSection = option(help="from where to where")


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """From which checkpoint to which file."""

    source: str = option(help="checkpoint to read: what model.path may be")
    path: str = option(help="what to write, which must not exist yet: a .gguf file, else a directory")
    format: Literal["hf", "gguf", "compressed-tensors", "mobile", "peft"] = option(
        "hf", "what to write; peft: adapters alone, all others merge them first"
    )
    base: str | None = option(None, "of adapters at source: where their base lies; none: where it lay in training")
    dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "of what is not written as codes")
    policy: PolicyName | None = option(
        None, "round a float checkpoint to this policy's grids now, without training; none: the grids it was trained on"
    )
    tokenizer: str | None = option(None, "tokenizer file or directory; none: beside the source")
    requantise: bool = option(False, "let the file hold other values than the model computes with")
    experts: Literal["float", "packed"] = option(
        "float", "compressed-tensors: experts stacked for transformers, or packed one by one for vLLM"
    )
    max_shard_size: str = option("5GB", "largest safetensors file")
    name: str | None = option(None, "of the model inside a GGUF file; none: the file's")
    text_only: bool = option(False, "leave out the vision and audio towers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRun(Run):
    """Write a checkpoint for llama.cpp, vLLM or transformers, with the codes it was trained on."""

    task: Literal["export"] = option("export", "which program")
    export: ExportSection = option(help="from where to where")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Which step, for which devices; nothing runs and no device is needed."""

    topology: str = option(
        "v6e:4x4", "devices to plan for, a chip and a shape: v5e:2x4, v6e:8x8, v5p:4x4x4, tpu7x:2x2x1, h100:8"
    )
    step: Literal["sft", "qat", "lora", "prefill", "decode"] = option("sft", "which program")
    mode: Literal["compile", "estimate"] = option(
        "compile",
        "compile it (minutes, exact) or estimate it and rank meshes and batches (seconds, rough)",
    )
    batch_size: int = option(16, "sequences at a time, over all devices")
    seq_len: int = option(4096, "tokens of a sequence; of decode, slots of the cache")
    remat: Remat = option("full", "as train.remat, for sft, qat and lora")
    grad_accum: int = option(1, "as train.grad_accum, for sft, qat and lora")
    first_moment: Literal["float32", "bfloat16"] = option("float32", "as optim.first_moment, for sft, qat and lora")
    headroom: float = option(0.0, "share of the memory to leave free")
    parameters: bool = option(False, "list every parameter: how it is cut, and its bytes on a device")
    output: str | None = option(None, "JSON file for the numbers")
    hlo: str | None = option(None, "file for the text of the compiled program")

    def __post_init__(self):
        topology(self.topology)  # complains about an unknown one before anything is traced
        for name in ("batch_size", "seq_len", "grad_accum"):
            if getattr(self, name) < 1:
                raise UserError(f"plan.{name} is at least 1, got {getattr(self, name)}.")
        if not 0 <= self.headroom < 1:
            raise UserError(f"plan.headroom is a share from 0 up to 1, got {self.headroom}.")
        if self.hlo is not None and self.mode == "estimate":
            raise UserError(
                "plan.hlo is the text of a compiled program, but plan.mode=estimate compiles none; drop one."
            )
        if self.step in ("prefill", "decode"):
            for name in ("remat", "grad_accum", "first_moment"):
                if getattr(self, name) != PlanConfig.__dataclass_fields__[name].default:
                    raise UserError(f"plan.{name} belongs to training; plan.step={self.step} does not read it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(Run):
    """Find out whether a step fits, and how fast it could be, before the devices are rented."""

    task: Literal["plan"] = option("plan", "which program")
    model: ModelSection = option(help="the model; of a checkpoint only its config is read")
    mesh: MeshConfig = option(factory=MeshConfig, help="how devices share the work; none: chosen")
    plan: PlanConfig = option(factory=PlanConfig, help="which step on which devices")
    quant: QuantConfig = option(factory=QuantConfig, help="policy and teacher of plan.step=qat")
    lora: LoraConfig = option(factory=LoraConfig, help="adapters and base of plan.step=lora")

    def __post_init__(self):
        if self.plan.step != "qat" and self.quant != QuantConfig():
            raise UserError(f"config.quant belongs to plan.step=qat; plan.step={self.plan.step} does not read it.")
        if self.quant.teacher_cache is not None:
            raise UserError(
                "config.quant.teacher_cache is for training; to plan a step without a teacher set config.quant.distill_weight=0."
            )
        if self.plan.step != "lora" and self.lora != LoraConfig():
            raise UserError(f"config.lora belongs to plan.step=lora; plan.step={self.plan.step} does not read it.")


TASKS: dict[str, type[Run]] = {
    "sft": SftRun,
    "qat": QatRun,
    "sample": SampleRun,
    "eval": EvalRun,
    "convert": ConvertRun,
    "export": ExportRun,
    "plan": PlanRun,
}


def defaults(task: str) -> Any:
    """What a config file starts from: a ConfigDict of every key of the task that has a default.

    Keys without one (a checkpoint to read, a data file) are for the config file or the command line to set. The ConfigDict
    takes any key and value; `read` does the checking, in one place and with one kind of complaint.
    """
    return ConfigDict(schema.default_mapping(task_class(task)), type_safe=False, convert_dict=True)


def read(mapping: Mapping[str, Any]) -> Run:
    """The settings of the task that `mapping["task"]` names; UserError in one sentence otherwise."""
    run = schema.from_mapping(task_class(mapping.get("task")), mapping)
    if run.workdir is not None and "://" in run.workdir:
        raise UserError(
            f"config.workdir is {run.workdir}, but metrics, logs and reports are written as files; mount the bucket (gcsfuse, or "
            "--bucket of the scripts in launch/) and name the directory it is mounted at."
        )
    return run


def task_class(task: Any) -> type[Run]:
    """The settings dataclass of a task."""
    if task is None:
        raise UserError(f"config.task must be set; known: {', '.join(TASKS)}.")
    if task not in TASKS:
        raise UserError(f"config.task is {task!r}, which is no task; {did_you_mean(str(task), TASKS)}")
    return TASKS[task]

"""The teacher of `task=qat`: beside the student in every step, or its answers on disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from gemma4_jax.checkpoint.adapters import base_digest
from gemma4_jax.checkpoint.load import source
from gemma4_jax.data.pipeline import Loader
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import in_compute_dtype
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor
from gemma4_jax.quant import policy
from gemma4_jax.train.teaching import Answers, ask
from launch.models import check_agreement, make_model
from launch.settings import QatRun, TrainRun


class Teaching(NamedTuple):
    """What a student learns from beside its rows: a teacher, or what it said; neither without distillation."""

    teacher: Transformer | None = None
    answers: Answers | None = None
    shares_arrays: bool = False
    """Whether the teacher's arrays may be those of the model that training starts from."""


def teaching(
    run: TrainRun,
    model: Transformer,
    processor: Processor,
    mesh: Mesh | None,
    batches: Loader,
    write: Callable[[str], None],
    *,
    resumes: bool,
) -> Teaching:
    """The teacher of the settings; `model` is what training starts from.

    With `quant.teacher_cache` a run that begins has the answers to all its rows written first, and `batches` are as new after it.
    """
    if not isinstance(run, QatRun) or run.quant.distill_weight == 0.0:
        return Teaching()
    if run.quant.teacher_cache is None:
        return Teaching(_teacher(run, model, processor, mesh, write), shares_arrays=run.quant.teacher is None)
    if run.quant.teacher_top_k > model.cfg.vocab_size:
        raise UserError(
            f"quant.teacher_top_k={run.quant.teacher_top_k} is more than the {model.cfg.vocab_size} tokens there are; lower it."
        )
    about = {"teacher": run.quant.teacher or run.model.path or run.model.variant, "digest": _digest(run, model)}
    answers = Answers(run.quant.teacher_cache, about, top_k=run.quant.teacher_top_k, writer=jax.process_index())
    if not resumes:
        start = batches.state()
        ask(answers, lambda: _teacher(run, model, processor, mesh, write), batches, run.train.steps, write)
        batches.restore(start)
    return Teaching(answers=answers)


def _teacher(
    run: QatRun, model: Transformer, processor: Processor, mesh: Mesh | None, write: Callable[[str], None]
) -> Transformer:
    """The frozen float model of the loss, stored as it computes: the one training starts from unless another is named."""
    if run.quant.teacher is None:
        return in_compute_dtype(policy.without(model), run.model.dtype)
    section = type(run.model)(path=run.quant.teacher, dtype=run.model.dtype, param_dtype=run.model.param_dtype)
    teacher = make_model(section, run.seed, mesh)
    check_agreement(teacher.cfg, processor)
    write(f"teacher: {run.quant.teacher}")
    return in_compute_dtype(policy.without(teacher), run.model.dtype)


def _digest(run: QatRun, model: Transformer) -> str:
    """Of the teacher: of the weights that training starts from, or, so that it need not be read, of its files' sizes and times."""
    if run.quant.teacher is None:
        return base_digest(model)
    total = hashlib.sha256()
    for file in sorted(source(run.quant.teacher).files):
        stat = Path(file).stat()
        total.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return total.hexdigest()

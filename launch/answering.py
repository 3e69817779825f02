"""`task=sample` and `task=eval`: what needs a model that answers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from gemma4_jax.data.pipeline import DataConfig, make_loader
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.eval import report
from gemma4_jax.eval.exact_match import exact_match
from gemma4_jax.eval.perplexity import evaluate_loss
from gemma4_jax.infer import program
from gemma4_jax.infer.generate import Completion, Sampler
from gemma4_jax.infer.prompts import conversation, read_prompts
from gemma4_jax.mesh_choice import decoding_mesh
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor
from gemma4_jax.sharding import check_batch
from launch.models import check_agreement, make_model, make_processor, model_config
from launch.processes import devices, on
from launch.settings import EvalRun, SampleRun

Write = Callable[[str], None]


def run_sample(run: SampleRun, write: Write = print) -> list[Completion]:
    """Answers the prompts of the settings."""
    prompts = read_prompts(run.prompts)
    cfg = model_config(run.model)
    processor = make_processor(run.tokenizer, run.model, cfg)
    check_agreement(cfg, processor)
    mesh = decoding_mesh(cfg, run.mesh, devices(run.mesh))
    with on(mesh):
        # The weights are unrolled for this and needed for nothing else.
        sampler = Sampler(
            make_model(run.model, run.seed, mesh),
            processor,
            max_length=run.sample.max_length,
            batch_size=run.sample.batch_size,
            cache=run.sample.cache,
            consume=True,
        )
        return program.run_sample(sampler, prompts, run.sample, seed=run.seed, output=run.prompts.output, write=write)


def run_eval(run: EvalRun, write: Write = print) -> dict[str, float]:
    """Perplexity and exact match of a checkpoint on held-out rows."""
    if "exact_match" in run.eval.metrics and run.data.kind != "chat":
        raise UserError(f"exact match needs chats, but data.kind is {run.data.kind!r}; set eval.metrics=perplexity.")
    cfg = model_config(run.model)
    processor = make_processor(run.tokenizer, run.model, cfg)
    check_agreement(cfg, processor, run.data)
    mesh = decoding_mesh(cfg, run.mesh, devices(run.mesh))
    check_batch(mesh, run.data.batch_size, run.data.seq_len)
    with on(mesh):
        results = _measured(run, processor, make_model(run.model, run.seed, mesh), write)
    if run.workdir is not None:
        path = Path(run.workdir) / "eval.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        write(f"wrote {path}")
    return results


def _measured(run: EvalRun, processor: Processor, model: Transformer, write: Write) -> dict[str, float]:
    results: dict[str, float] = {}
    if "perplexity" in run.eval.metrics:
        results |= held_out_loss(model, processor, run.data, run.eval.max_examples, write)
        write(report.losses(results))
    if "exact_match" in run.eval.metrics:
        rows = [conversation(row) for row in FileRows(run.data.paths)][: run.eval.max_examples]
        sampler = Sampler(
            model,
            processor,
            max_length=run.sample.max_length,
            batch_size=run.sample.batch_size,
            cache=run.sample.cache,
        )
        found = exact_match(
            rows, lambda prompts: program.answer(sampler, prompts, run.sample, seed=run.seed, write=write)
        )
        write(f"{report.scores(found)}\n{report.wrong_answers(found.wrong, run.eval.show_wrong)}".rstrip())
        results["exact_match"] = found.overall.accuracy
    return results


def held_out_loss(
    model: Transformer, processor: Processor, data: DataConfig, max_rows: int | None, write: Write
) -> dict[str, float]:
    """Loss and perplexity over one pass of the rows in file order."""
    loader = make_loader(dataclasses.replace(data, epochs=1, shuffle=False), processor)
    try:
        write(f"held-out data\n{loader.summary.table()}")
        return evaluate_loss(model, loader, max_batches=None if max_rows is None else -(-max_rows // data.batch_size))
    finally:
        loader.close()

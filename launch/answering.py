"""`task=sample` and `task=eval`: what needs a model that answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from gemma4_jax.checkpoint.drafter import load_drafter, read_drafter_config
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.pipeline import DataConfig, held_out
from gemma4_jax.data.records import open_rows
from gemma4_jax.errors import UserError
from gemma4_jax.eval import report
from gemma4_jax.eval.call_rows import CallRow, asked, call_rows, read_answers, score
from gemma4_jax.eval.exact_match import ExactMatch, exact_match
from gemma4_jax.eval.perplexity import evaluate_loss
from gemma4_jax.infer import program
from gemma4_jax.infer.generate import Completion, SampleConfig, Sampler
from gemma4_jax.infer.prompts import Prompt, conversation, read_prompts
from gemma4_jax.mesh_choice import decoding_mesh
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor
from gemma4_jax.sharding import check_batch
from launch.comparing import run_comparison
from launch.models import check_agreement, make_model, make_processor, model_config
from launch.processes import devices, on
from launch.settings import EvalRun, SampleRun

Write = Callable[[str], None]


def run_sample(run: SampleRun, write: Write = print) -> list[Completion]:
    """Answers the prompts of the settings."""
    prompts = read_prompts(run.prompts)
    cfg = model_config(run.model)
    processor = make_processor(run.tokenizer, run.model, cfg, run.media)
    if run.prompts.chat is not None:  # a file of others must not name whatever it likes
        processor = processor.below(Path(run.prompts.chat).parent)
    check_agreement(cfg, processor)
    drafter = make_drafter(run.sample, cfg)
    mesh = decoding_mesh(cfg, run.mesh, devices(run.mesh), run.sample.batch_size * (run.sample.max_length or 0))
    with on(mesh):
        # The weights are unrolled for this and needed for nothing else.
        sampler = _sampler(run.sample, make_model(run.model, run.seed, mesh), processor, drafter, consume=True)
        return program.run_sample(sampler, prompts, run.sample, seed=run.seed, output=run.prompts.output, write=write)


def _sampler(
    how: SampleConfig, model: Transformer, processor: Processor, drafter: Drafter | None, *, consume: bool = False
) -> Sampler:
    return Sampler(
        model,
        processor,
        max_length=how.max_length,
        batch_size=how.batch_size,
        cache=how.cache,
        consume=consume,
        packed=how.packed,
        drafter=drafter,
        draft_tokens=how.draft_tokens,
    )


def make_drafter(sample: SampleConfig, cfg: ModelConfig) -> Drafter | None:
    """The drafter of the settings, if there is one. UserError for one of another model."""
    check_drafter(sample, cfg)
    try:
        return None if sample.drafter is None else load_drafter(sample.drafter)
    except UserError as error:
        raise UserError(f"sample.drafter: {error}") from None


def check_drafter(sample: SampleConfig, cfg: ModelConfig) -> None:
    """UserError for a drafter of another model, from its config alone."""
    try:
        if sample.drafter is not None:
            read_drafter_config(sample.drafter).check_target(cfg)
    except UserError as error:
        raise UserError(f"sample.drafter: {error}") from None


def run_eval(run: EvalRun, write: Write = print) -> dict[str, float]:
    """Perplexity, exact match and tool calls of a checkpoint on held-out rows, or the calls of a file of answers."""
    if "exact_match" in run.eval.metrics and run.data.kind != "chat":
        raise UserError(f"exact match needs chats, but data.kind is {run.data.kind!r}; set eval.metrics=perplexity.")
    rows = wanted_calls(run) if "tool_calls" in run.eval.metrics else []
    if run.eval.answers is not None:
        found = score(rows, read_answers(run.eval.answers, rows))
        return _kept(run, _reported(run, found, "tool_calls", write), write)
    cfg = model_config(run.model)
    processor = make_processor(run.tokenizer, run.model, cfg, run.media)
    check_agreement(cfg, processor, run.data)
    check_drafter(run.sample, cfg)
    mesh = decoding_mesh(cfg, run.mesh, devices(run.mesh), run.sample.batch_size * (run.sample.max_length or 0))
    check_batch(mesh, run.data.batch_size, run.data.seq_len)
    with on(mesh):
        results = _measured(run, processor, make_model(run.model, run.seed, mesh), rows, write, mesh)
    return _kept(run, results, write)


def wanted_calls(run: EvalRun) -> list[CallRow]:
    """The rows of the metric tool_calls."""
    return call_rows(run.data.paths, run.eval.truth)[: run.eval.max_examples]


def _kept(run: EvalRun, results: dict[str, float], write: Write) -> dict[str, float]:
    if run.workdir is not None:
        path = Path(run.workdir) / "eval.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        write(f"wrote {path}")
    return results


def _reported(run: EvalRun, found: ExactMatch, metric: str, write: Write) -> dict[str, float]:
    """Prints a score; what of it is kept: the whole, and of tool calls each task's, if there are several."""
    name = metric.replace("_", " ")
    write(f"{report.scores(found, name)}\n{report.wrong_answers(found.wrong, run.eval.show_wrong)}".rstrip())
    tasks = found.tasks if metric == "tool_calls" and len(found.tasks) > 1 else {}
    return {metric: found.overall.accuracy} | {f"{metric}.{task}": one.accuracy for task, one in tasks.items()}


def _measured(
    run: EvalRun,
    processor: Processor,
    model: Transformer,
    calls: Sequence[CallRow],
    write: Write,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, float]:
    results: dict[str, float] = {}
    if run.eval.against:
        ask = _exact_match_of(run, processor, write) if "exact_match" in run.eval.metrics else None
        return run_comparison(run, processor, model, ask, write, mesh=mesh)
    if "perplexity" in run.eval.metrics:
        results |= held_out_loss(model, processor, run.data, run.eval.max_examples, write)
        write(report.losses(results))
    if set(run.eval.metrics) - {"perplexity"}:
        place = Path(run.data.paths[0]).parent
        sampler = _sampler(run.sample, model, processor.below(place), make_drafter(run.sample, model.cfg))

        def generate(prompts: Sequence[Prompt]) -> list[Completion]:
            return program.answer(sampler, prompts, run.sample, seed=run.seed, write=write)

        if "exact_match" in run.eval.metrics:
            rows = [conversation(row) for row in open_rows(run.data.paths)][: run.eval.max_examples]
            results |= _reported(run, exact_match(rows, generate), "exact_match", write)
        if "tool_calls" in run.eval.metrics:
            results |= _reported(run, asked(calls, generate), "tool_calls", write)
    return results


def _exact_match_of(run: EvalRun, processor: Processor, write: Write) -> Callable[[Transformer], float]:
    """Exact match of one model after another, all with one compiled sampler."""
    rows = [conversation(row) for row in open_rows(run.data.paths)][: run.eval.max_examples]
    samplers: list[Sampler] = []

    def ask(model: Transformer) -> float:
        if not samplers:
            place = Path(run.data.paths[0]).parent
            samplers.append(_sampler(run.sample, model, processor.below(place), make_drafter(run.sample, model.cfg)))
        (sampler,) = samplers
        sampler.update(model)
        found = exact_match(
            rows, lambda prompts: program.answer(sampler, prompts, run.sample, seed=run.seed, write=write)
        )
        return found.overall.accuracy

    return ask


def held_out_loss(
    model: Transformer, processor: Processor, data: DataConfig, max_rows: int | None, write: Write
) -> dict[str, float]:
    """Loss and perplexity over one pass of the rows in file order."""
    with held_out(data, processor) as loader:
        write(f"held-out data\n{loader.summary.table()}")
        return evaluate_loss(model, loader, max_batches=None if max_rows is None else -(-max_rows // data.batch_size))

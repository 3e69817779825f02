"""What a training run shows of itself on the way: answers of the model as it is, traces, boards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.config import ModelConfig
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.eval.exact_match import exact_match
from gemma4_jax.eval.report import wrong_answers
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.infer.program import shown
from gemma4_jax.infer.prompts import conversation
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor
from gemma4_jax.train import recorder, tracing
from launch.settings import TrainRun

SAMPLES, SAMPLE_TOKENS = 2, 64
"""Held-out conversations shown during training, and the most tokens of an answer."""


def check(run: TrainRun) -> None:
    """UserError for what would show nothing, before weights are read."""
    recorder.check(run.track)
    tracing.check(run.profile, run.workdir, run.train.steps)
    if run.train.sample_prompts and not run.train.sample_every:
        raise UserError("train.sample_prompts are asked every train.sample_every steps, which is 0; set it.")
    if run.train.sample_every and not run.train.sample_prompts and not _held_out_chats(run):
        raise UserError(
            "train.sample_every shows answers to train.sample_prompts and to the first held-out chats, and there are neither: set "
            "train.sample_prompts, or eval_data with kind=chat."
        )


def samples(run: TrainRun, cfg: ModelConfig, processor: Processor) -> Callable[[Transformer], str] | None:
    """What the model answers to the prompts of the settings, and to held-out conversations beside what the data say."""
    if not run.train.sample_every:
        return None
    asked: list[Mapping[str, Any]] = [{"messages": [{"role": "user", "content": x}]} for x in run.train.sample_prompts]
    rows: list[Mapping[str, Any]] = []
    if run.eval_data is not None and _held_out_chats(run):
        rows = [conversation(row) for row, _ in zip(FileRows(run.eval_data.paths), range(SAMPLES), strict=False)]
        processor = processor.below(Path(run.eval_data.paths[0]).parent)
    prompts = [*asked, *({**row, "messages": row["messages"][:-1]} for row in rows)]
    length = min(run.data.seq_len + SAMPLE_TOKENS, cfg.max_position_embeddings)

    def sample(model: Transformer) -> str:
        # Made anew each time: its unrolled copy of the weights should not outlive the answers. Nothing compiles again.
        sampler = Sampler(model, processor, max_length=length, batch_size=SAMPLES)
        answers = sampler.generate(prompts, max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
        lines = [
            f"  asked   {question}\n  got     {shown(answer)}"
            for question, answer in zip(run.train.sample_prompts, answers, strict=False)
        ]
        if rows:
            held_out = answers[len(asked) :]
            found = exact_match(rows, lambda _: held_out)
            wrong = {one.index for one in found.wrong}
            right = [shown(answer) for index, answer in enumerate(held_out) if index not in wrong]
            lines.append(f"held-out chats: {found.overall.correct} of {found.overall.total} as wanted")
            lines += [f"  as wanted: {text}" for text in right]
            lines.append(wrong_answers(found.wrong))
        return "\n".join(["samples", *(line for line in lines if line)])

    return sample


def _held_out_chats(run: TrainRun) -> bool:
    return run.eval_data is not None and run.eval_data.kind == "chat"

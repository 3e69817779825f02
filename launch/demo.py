"""`make demo`: SFT, QAT and sampling of a tiny Gemma 4 on the embedded data, and one table of what it learned.

The same programs and configs that `launch.run` runs; only the table is made here.
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import TypeVar

from gemma4_jax.checkpoint.load import load
from gemma4_jax.data.source import FileRows
from gemma4_jax.errors import UserError
from gemma4_jax.eval.exact_match import ExactMatch, exact_match
from gemma4_jax.eval.report import percent, table
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.infer.program import answer, shown
from gemma4_jax.infer.prompts import conversation
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant import policy
from gemma4_jax.train.metrics import duration
from launch.models import make_model, make_processor
from launch.run import load_config, quiet_libraries
from launch.settings import EvalRun, QatRun, Run, SftRun, read
from launch.training import run_training

HOME = Path("runs/demo")
SHOWN = 4
"""Held-out questions printed with their answers."""

AnyRun = TypeVar("AnyRun", bound=Run)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One line of the table. `tokens` were trained on in `seconds`, if it is a stage of training."""

    name: str
    found: ExactMatch
    seconds: float | None = None
    tokens: int = 0
    weights: str = "float32"

    def row(self) -> tuple:
        calls = [score for task, score in self.found.tasks.items() if task.startswith("tool")]
        right, total = sum(score.correct for score in calls), sum(score.total for score in calls)
        speed = None if self.seconds is None else f"{self.tokens / self.seconds:,.0f}"
        seconds = None if self.seconds is None else f"{self.seconds:.0f}"
        share = percent(right / total) if total else None
        return self.name, self.weights, percent(self.found.overall.accuracy), share, seconds, speed


def main() -> int:
    """Runs everything; returns the exit code."""
    started = time.perf_counter()
    quiet_libraries()
    shutil.rmtree(HOME, ignore_errors=True)
    sft = _settings("tiny_sft", SftRun, HOME / "sft")
    qat = _settings("tiny_qat", QatRun, HOME / "qat")
    qat = dataclasses.replace(qat, model=dataclasses.replace(qat.model, path=str(HOME / "sft")))
    ask = Questions(_settings("tiny_eval", EvalRun, None))

    print("1/3  SFT of a tiny E2B on the embedded chat tasks", flush=True)
    untrained = make_model(sft.model, sft.seed)
    stages = [Stage("before SFT", ask(untrained))]
    trained, seconds = _timed(sft)
    stages.append(Stage("after SFT", ask(trained), seconds, _slots(sft)))

    print("\n2/3  Quantisation: rounding the trained weights, then training with rounded weights", flush=True)
    rounded = policy.snap(policy.apply(trained, qat.quant))
    grid = qat.quant.grid or qat.quant.policy
    stages.append(Stage("post-training int4", ask(rounded), weights=grid))
    quantised, seconds = _timed(qat)
    stages.append(Stage("QAT int4", ask(quantised), seconds, _slots(qat), weights=grid))

    print("\n3/3  Sampling the QAT model: held-out questions", flush=True)
    ask.show(SHOWN)
    header = ("model", "weights", "exact match", "of tool calls", "training s", "tokens/s")
    print(f"\nheld-out exact match, {len(ask.rows)} questions no training row contains")
    print(table(header, [stage.row() for stage in stages]))
    print(
        f"\nall in {duration(time.perf_counter() - started)}; checkpoints, metrics and TensorBoard files are in {HOME}"
    )
    return 0


class Questions:
    """Held-out rows, asked of one model after another with one compiled sampler."""

    def __init__(self, run: EvalRun):
        self.run = run
        self.rows = [conversation(row) for row in FileRows(run.data.paths)]
        self.sampler: Sampler | None = None

    def __call__(self, model: Transformer) -> ExactMatch:
        if self.sampler is None:
            processor = make_processor(self.run.tokenizer, self.run.model, model.cfg)
            self.sampler = Sampler(model, processor, max_length=256, batch_size=self.run.sample.batch_size)
        self.sampler.update(model)
        sampler = self.sampler
        found = exact_match(self.rows, lambda prompts: answer(sampler, prompts, self.run.sample, seed=0, write=print))
        print(f"held-out exact match: {percent(found.overall.accuracy)}", flush=True)
        return found

    def show(self, count: int) -> None:
        """Prints the answers of the model asked last, to one row of each kind of task."""
        assert self.sampler is not None
        kinds = {row["task"]: row for row in reversed(self.rows)}
        rows = list(kinds.values())[:count]
        prompts = [{**row, "messages": row["messages"][:-1]} for row in rows]
        completions = answer(self.sampler, prompts, self.run.sample, seed=0, write=print)
        for prompt, completion in zip(prompts, completions, strict=True):
            print(f"  > {prompt['messages'][-1]['content']}\n    {shown(completion)}")


def _settings(config: str, kind: type[AnyRun], workdir: Path | None) -> AnyRun:
    run = read(load_config(f"configs/{config}.py"))
    assert isinstance(run, kind)
    return dataclasses.replace(run, workdir=None if workdir is None else str(workdir))


def _timed(run: SftRun | QatRun) -> tuple[Transformer, float]:
    """The model after training, read back from its checkpoint, and how long training took."""
    started = time.perf_counter()
    run_training(run)
    return load(str(run.workdir), compute_dtype=run.model.dtype), time.perf_counter() - started


def _slots(run: SftRun | QatRun) -> int:
    return run.train.steps * run.data.batch_size * run.data.seq_len


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"demo: {error}")

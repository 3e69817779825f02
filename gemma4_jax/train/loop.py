"""The training loop: data, step, log, evaluate, sample, save."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from gemma4_jax.checkpoint.store import Store
from gemma4_jax.errors import Preempted, UserError
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.options import option
from gemma4_jax.sharding import place_batch
from gemma4_jax.train.interruption import Notices, Watchdog
from gemma4_jax.train.metrics import Meter, Write, duration
from gemma4_jax.train.recorder import Recorder
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import TrainStep
from gemma4_jax.train.tracing import Tracer

Remat = Literal["none", "full", "offload", "save_attention", "save_projections"]
"""The keys of `model.stack.REMAT`."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much memory, and how often to look."""

    steps: int = option(1000, "optimizer steps of the whole run")
    grad_accum: int = option(1, "micro-batches a batch is cut into")
    remat: Remat = option("none", "what the backward pass computes again")
    balance_weight: float = option(0.0, "of the loss that spreads tokens over experts (26B-A4B); 0.01 is usual")
    log_every: int = option(10, "steps between log lines", may_change=True)
    eval_every: int = option(0, "steps between evaluations; 0: only after the last", may_change=True)
    eval_batches: int | None = option(None, "held-out batches an evaluation reads; none: all", may_change=True)
    sample_every: int = option(0, "steps between printed samples; 0: none", may_change=True)
    sample_prompts: tuple[str, ...] = option(
        (), "what is asked then, before the first held-out conversations", may_change=True
    )
    save_every: int = option(0, "steps between checkpoints; 0: only after the last", may_change=True)
    keep: int = option(2, "newest checkpoints that stay on disk", may_change=True)
    keep_best: bool = option(
        False, "evaluate at every save, and keep the checkpoint with the lowest loss too", may_change=True
    )
    skip_above: float | None = option(
        None, "skip updates whose gradient norm is above this; none: only what is not finite"
    )
    max_skipped: int = option(20, "end the run after more skipped updates in a row", may_change=True)
    verify: bool = option(True, "compare a checkpoint with its digests before the run goes on from it", may_change=True)
    fall_back: bool = option(
        False, "if the newest checkpoint is damaged, set it aside and go on from the one before", may_change=True
    )
    stall_seconds: float = option(
        1800.0,
        "end the run, with the stacks of its threads, when nothing happens for so long; 0: never",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name in ("steps", "grad_accum", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is at least 1, got {getattr(self, name)}.")
        for name in ("eval_every", "sample_every", "save_every", "balance_weight", "stall_seconds", "max_skipped"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is at least 0, got {getattr(self, name)}.")


class Batches(Iterator[dict[str, np.ndarray]], Protocol):
    """An endless iterator of batches whose place can be saved (`data.pipeline.Loader`)."""

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        ...


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know: evaluation and sampling of the model as it is, traces, and where lines go."""

    evaluate: Callable[[Transformer], dict[str, float]] | None = None
    sample: Callable[[Transformer], str] | None = None
    write: Write = print
    tracer: Tracer | None = None


def resume(
    store: Store | None,
    state: TrainState,
    batches: Batches,
    *,
    verify: bool = True,
    fall_back: bool = False,
    write: Write = print,
) -> TrainState:
    """The newest committed state, with `batches` moved to where it was taken; `state` itself when there is none.

    With `fall_back` the newest that can be restored; those after it are set aside and named. UserError if there is none.
    """
    steps = [] if store is None else store.steps()
    if store is None or not steps:
        return state
    damaged: dict[int, UserError] = {}
    for step in reversed(steps):
        try:
            values, meta = store.restore(step, state.flat(), verify=verify)
            break
        except UserError as error:
            damaged[step] = error
            if not fall_back or step == steps[0]:
                raise
    if damaged:
        aside = store.set_aside(list(damaged))
        for error in damaged.values():
            write(f"set aside into {aside}: {error}")
    batches.restore(meta["data"])
    return state.with_flat(values)


def train(
    config: TrainConfig,
    *,
    state: TrainState,
    template: Transformer,
    step: TrainStep,
    learning_rate: Callable[[int], Any],
    batches: Batches,
    teacher: Transformer | None,
    store: Store | None,
    meta: Mapping[str, Any],
    recorder: Recorder,
    meter: Meter,
    hooks: Hooks,
) -> TrainState:
    """Trains from `state` to `config.steps`; returns the last state, saved.

    Told to end before (SIGTERM), it saves where it is and raises Preempted.

    Args:
      config: how long and how often.
      state: where to start; donated.
      template: structure of the model whose arrays the state holds.
      step: from `make_train_step`.
      learning_rate: by step, for the log.
      batches: data; its place is saved with each checkpoint.
      teacher: the float model that QAT distils from, or None.
      store: where checkpoints go; None saves nothing.
      meta: what else a checkpoint says about the model.
      recorder: where numbers go.
      meter: makes log lines.
      hooks: evaluation, samples, text output.
    """
    started = done = int(state.step)
    with Notices() as notices, Watchdog(config.stall_seconds) as watchdog:
        aside = _Aside(config, template, store, meta, recorder, meter, hooks, watchdog)
        ended = notices.resumed(started)
        while done < config.steps and not ended:
            place = batches.state()
            watchdog.beat("reading data")
            with notices.waiting():
                batch = _next(batches, done, config.steps)
            if notices.interrupted:
                break
            watchdog.beat(f"step {done + 1}")
            began = time.perf_counter()
            with contextlib.nullcontext() if hooks.tracer is None else hooks.tracer.step(done + 1):
                state, metrics = step(state, place_batch(batch), teacher)
            if done == started:
                seconds = time.perf_counter() - began
                hooks.write(f"compiled the step in {duration(seconds)}")
                meter.pause(seconds)
            meter.add({**metrics, "learning_rate": learning_rate(done)})
            done += 1
            place = batches.state()
            aside.after_step(done, state, place, metrics)
            ended = done < config.steps and notices.reached(done)
        if done < config.steps:
            hooks.write(f"told to end after step {done} of {config.steps}")
            if done > started:
                aside.save(done, state, place, None)
        if hooks.tracer is not None:
            hooks.tracer.close(done)
        watchdog.beat("writing the last checkpoint")
        if store is not None:
            store.wait()
        aside.report_committed()
    if done < config.steps:
        raise Preempted(done)
    return state


@dataclasses.dataclass(frozen=True)
class _Aside:
    """What is done between two steps, when it is due: log, evaluation, samples, checkpoints."""

    config: TrainConfig
    template: Transformer
    store: Store | None
    meta: Mapping[str, Any]
    recorder: Recorder
    meter: Meter
    hooks: Hooks
    watchdog: Watchdog

    def after_step(self, done: int, state: TrainState, place: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Everything that is due after step `done`; its time does not count as training."""
        if self.hooks.tracer is not None:
            with self.watchdog.paused():
                self.meter.pause(self.hooks.tracer.done(done, metrics))
        if self._due(done, self.config.log_every):
            values, line = self.meter.read(done)
            self.hooks.write(line)
            self.recorder.write(done, values)
            _refuse_skipping(self.meter.skipped_in_a_row, self.config.max_skipped, values["loss"], done)
        began = time.perf_counter()
        with self.watchdog.paused():
            evaluated = self._evaluate(done, state)
            self._sample(done, state)
        if self._due(done, self.config.save_every):
            self.watchdog.beat(f"saving step {done}")
            self.save(done, state, place, evaluated)
        self.report_committed()
        self.meter.pause(time.perf_counter() - began)

    def save(self, done: int, state: TrainState, place: dict[str, Any], evaluated: dict[str, float] | None) -> None:
        """Begins a checkpoint. It is ranked by its own evaluation, never by an older one."""
        if self.store is not None:
            self.store.save(done, state.flat(), {**self.meta, "data": place}, metrics=evaluated)

    def report_committed(self) -> None:
        """Says which checkpoints are on disk since the last call."""
        if self.store is not None and (line := self.store.committed()):
            self.hooks.write(line)

    def _due(self, done: int, every: int) -> bool:
        return (every > 0 and done % every == 0) or done == self.config.steps

    def _evaluate(self, done: int, state: TrainState) -> dict[str, float] | None:
        ranked = self.config.keep_best and self._due(done, self.config.save_every)
        if self.hooks.evaluate is None or not (ranked or self._due(done, self.config.eval_every)):
            return None
        evaluated = self.hooks.evaluate(state.model(self.template))
        self.hooks.write(f"eval {done:>{len(str(self.config.steps))}}/{self.config.steps}  {_listed(evaluated)}")
        self.recorder.write(done, evaluated, prefix="eval")
        return evaluated

    def _sample(self, done: int, state: TrainState) -> None:
        if self.hooks.sample is not None and self.config.sample_every and self._due(done, self.config.sample_every):
            text = self.hooks.sample(state.model(self.template))
            self.hooks.write(text)
            self.recorder.text(done, "samples", text)


def _next(batches: Batches, done: int, steps: int) -> dict[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(
            f"The data ended after {done} of train.steps={steps}; set data.epochs=none to go round, or fewer steps."
        ) from None


def _refuse_skipping(in_a_row: int, most: int, loss: float, step: int) -> None:
    if in_a_row > most:
        raise UserError(
            f"The last {in_a_row} updates up to step {step} were skipped (train.max_skipped={most}), with a loss of {loss:.4g}: "
            "loss or gradients are not finite, or beyond train.skip_above. The model is that of before them. Lower "
            "optim.learning_rate or optim.clip_norm, or look at the rows of the last batches."
        )


def _listed(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" if value < 1e4 else f"{name} {value:.0f}" for name, value in values.items())

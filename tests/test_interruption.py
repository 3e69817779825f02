"""Runs that are told to end save and go on; runs in which nothing happens are ended."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gemma4_jax.checkpoint.steps import committed_steps
from gemma4_jax.checkpoint.store import Store
from gemma4_jax.errors import Preempted, UserError
from gemma4_jax.train.interruption import STALLED, Notices
from gemma4_jax.train.loop import Hooks, TrainConfig, resume, train
from gemma4_jax.train.metrics import Meter
from gemma4_jax.train.recorder import Recorder
from gemma4_jax.train.state import TrainState

STEPS = 12
CONFIG = TrainConfig(steps=STEPS, log_every=4, save_every=5, stall_seconds=0)


class Counting:
    """Batches that name their number; `at` maps a number to what happens before that batch is there."""

    def __init__(self, at=None):
        self.number, self.at = 0, at or {}

    def __next__(self):
        self.at.pop(self.number, lambda: None)()
        self.number += 1
        return {"tokens": np.full((1, 1), self.number, np.int32)}

    def state(self):
        return {"next": self.number}

    def restore(self, state):
        self.number = state["next"]


def told():
    os.kill(os.getpid(), signal.SIGTERM)


def told_while_waiting():
    """The notice comes while nothing else would ever come."""
    told()
    time.sleep(60)
    raise AssertionError("the notice did not end the waiting")


@jax.jit
def add(state: TrainState, batch, _teacher):
    w = state.params["w"] * 1.25 + batch["tokens"].sum().astype(jnp.float32)
    one = jnp.float32(1)
    metrics = {
        "loss": w.sum(),
        "tokens": one,
        "slots": one,
        "grad_norm": one,
        "ce": one,
        "kl": 0 * one,
        "skipped": 0 * one,
        "accuracy": one,
    }
    return dataclasses.replace(state, step=state.step + 1, params={"w": w}), metrics


def start() -> TrainState:
    return TrainState(jnp.int32(0), {"w": jnp.zeros(4)}, {}, ())


def run(directory, batches, step=add, lines=None, config=CONFIG) -> TrainState:
    state, lines = start(), [] if lines is None else lines
    with Store(directory) as store:
        return train(
            config,
            state=resume(store, state, batches),
            template=None,
            step=step,
            learning_rate=lambda step: 0.1,
            batches=batches,
            teacher=None,
            store=store,
            meta={},
            recorder=Recorder(None, 0),
            meter=Meter(STEPS, 1.0, None),
            hooks=Hooks(write=lines.append),
        )


def told_in_step(number):
    def step(state, batch, teacher):
        if int(state.step) == number:
            told()
        return add(state, batch, teacher)

    return step


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("in the first step", 1),
        ("in a step", 4),
        ("in the step that saves", 5),
        ("between data", 6),
        ("while data stall", 7),
        ("twice", 7),
        ("before anything", None),
    ],
)
def test_a_run_told_to_end_saves_goes_on_and_ends_with_the_same_bits(tmp_path, kind, saved):
    wanted = run(tmp_path / "whole", Counting())
    at, step = {}, add
    if kind == "in the first step":
        step = told_in_step(0)
    elif kind == "in a step":
        step = told_in_step(3)
    elif kind == "in the step that saves":
        step = told_in_step(4)
    elif kind == "between data":
        at = {6: told}
    elif kind == "while data stall":
        at = {7: told_while_waiting}
    elif kind == "twice":
        at = {7: lambda: (told(), told())}
    elif kind == "before anything":
        at = {0: told_while_waiting}
    lines = []
    with pytest.raises(Preempted, match="told to end") as caught:
        run(tmp_path / "cut", Counting(at), step, lines)
    assert caught.value.exit_code == 75
    assert any(line.startswith("told to end after step") for line in lines)
    with Store(tmp_path / "cut") as store:
        assert store.latest() == saved
    if saved is not None:
        assert any(line.startswith(f"committed step {store.latest()}: ") for line in lines)
    again = run(tmp_path / "cut", Counting())
    assert int(again.step) == STEPS
    np.testing.assert_array_equal(np.asarray(again.params["w"]), np.asarray(wanted.params["w"]))


class Service:
    """JAX's preemption service: a run ends at the step after the last that any process asked about when the notice came."""

    def __init__(self):
        self.asked, self.last = 0, None

    def notice(self) -> None:
        self.last = self.asked + 1

    def reached(self, step: int) -> bool:
        self.asked = step
        return step == self.last


@pytest.mark.parametrize(("told_in", "last"), [(None, 4), (4, 5), (6, 7)])
def test_processes_that_go_on_hear_a_notice_whenever_it_comes(tmp_path, monkeypatch, told_in, last):
    """Also before the first step of this run, which is not the first of all: None, and while that step is compiled."""
    with pytest.raises(Preempted):
        run(tmp_path / "run", Counting(), step=told_in_step(3))
    service = Service()

    def of_several(notices):
        notices._alone = notices._listens = False
        return notices

    monkeypatch.setattr(Notices, "__enter__", of_several)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    if told_in is None:
        service.notice()

    def step(state, batch, teacher):
        if int(state.step) == told_in:
            service.notice()
        return add(state, batch, teacher)

    with pytest.raises(Preempted, match=f"ended after step {last}"):
        run(tmp_path / "run", Counting(), step=step)
    with Store(tmp_path / "run") as store:
        assert store.latest() == last


def test_a_run_whose_updates_are_all_skipped_is_ended_and_what_was_good_is_kept(tmp_path):
    def step(state, batch, teacher):
        bad = int(state.step) >= 5
        state, metrics = add(state, batch, teacher)
        return state, {**metrics, "skipped": jnp.float32(bad), "loss": jnp.float32("nan" if bad else 1.0)}

    lines = []
    config = dataclasses.replace(CONFIG, max_skipped=5)
    with pytest.raises(UserError, match=r"last 7 updates up to step 12 were skipped \(train.max_skipped=5\)"):
        run(tmp_path, Counting(), step, lines, config)
    assert "skipped 3" in next(line for line in lines if line.startswith("step  8/12"))
    with Store(tmp_path) as store:
        assert store.latest() == 10


def test_a_run_in_which_nothing_happens_is_ended_with_its_stacks(tmp_path):
    program = textwrap.dedent("""
        import time
        from gemma4_jax.train.interruption import Watchdog

        def hang():
            time.sleep(60)

        with Watchdog(0.5) as watchdog:
            with watchdog.paused():
                time.sleep(1.5)
            for _ in range(4):
                time.sleep(0.3)
                watchdog.beat("step 7")
            print("alive", flush=True)
            hang()
        """)
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=60)
    assert done.returncode == STALLED, done.stderr
    assert done.stdout == "alive\n"
    assert "in step 7" in done.stderr
    assert "in hang" in done.stderr


def test_falling_back_is_asked_for_sets_aside_and_gives_the_same_end(tmp_path):
    whole = run(tmp_path / "whole", Counting())
    with pytest.raises(Preempted):
        run(tmp_path / "run", Counting(), told_in_step(6))
    newest, before = sorted((int(step.name) for step in (tmp_path / "run").glob("[0-9]*")), reverse=True)[:2]
    for file in (tmp_path / "run" / str(newest) / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"run/{newest} is damaged"):
        run(tmp_path / "run", Counting())
    lines, batches = [], Counting()
    with Store(tmp_path / "run") as store:
        state = resume(store, start(), batches, fall_back=True, write=lines.append)
    assert int(state.step) == batches.number == before
    assert f"set aside into {tmp_path / 'run_damaged'}: " in lines[0]
    assert f"{tmp_path / 'run' / str(newest)} is damaged" in lines[0]
    assert [path.name.split("-")[0] for path in (tmp_path / "run_damaged").iterdir()] == [str(newest)]
    np.testing.assert_array_equal(run(tmp_path / "run", Counting()).params["w"], whole.params["w"])
    for step in committed_steps(tmp_path / "run"):
        (tmp_path / "run" / str(step) / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="is damaged"), Store(tmp_path / "run") as store:
        resume(store, start(), batches, fall_back=True)
    assert len(list((tmp_path / "run_damaged").iterdir())) == 1  # nothing could be restored: nothing is moved

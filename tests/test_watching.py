"""Seeing a run: what is recorded, where it goes, traces on demand, and the page a run directory turns into."""

import json
import math
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from gemma4_jax.errors import UserError
from gemma4_jax.train import recorder, tracing
from gemma4_jax.train.metrics import Meter
from gemma4_jax.train.recorder import Recorder, TrackConfig
from gemma4_jax.train.tracing import ProfileConfig, Tracer
from launch import report, report_page, settings
from launch.chart import Series, line_chart, sparkline, ticks


class Wandb(types.ModuleType):
    """What W&B is asked for."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished += 1

    @staticmethod
    def Html(text):
        return ("html", text)


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_wandb_gets_every_number_and_one_run_for_all_processes(tmp_path, wandb):
    track = TrackConfig(tensorboard=False, wandb="gemma", wandb_mode="offline")
    recorder.check(track)
    for first in (0, 2):
        log = Recorder(tmp_path, first, track, {"train": {"steps": 4}})
        log.write(first + 1, {"loss": 2.0})
        log.write(first + 2, {"loss": 1.0}, prefix="eval")
        log.text(first + 2, "samples", "a < b")
        log.close()
    one, other = wandb.started
    assert one["id"] == other["id"] == (tmp_path / "wandb_run").read_text().strip()
    assert (one["project"], one["mode"], one["resume"]) == ("gemma", "offline", "allow")
    assert one["config"] == {"train": {"steps": 4}}
    assert wandb.logged[0] == {"step": 1, "train/loss": 2.0}
    assert wandb.logged[1] == {"step": 2, "eval/loss": 1.0}
    assert wandb.logged[2] == {"step": 2, "samples": ("html", "<pre>a &lt; b</pre>")}
    assert wandb.finished == 2
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [2, 4]
    assert not (tmp_path / "tensorboard").exists()


def test_only_one_process_records(tmp_path, wandb):
    log = Recorder(tmp_path, 0, TrackConfig(wandb="gemma"), speaks=False)
    log.write(1, {"loss": 2.0})
    log.text(1, "samples", "x")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert wandb.started == []


def test_tracking_is_checked_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(recorder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"track.wandb=gemma needs Weights & Biases: pip install wandb"):
        recorder.check(TrackConfig(wandb="gemma"))
    recorder.check(TrackConfig())
    with pytest.raises(UserError, match=r"belong to track.wandb=PROJECT"):
        TrackConfig(wandb_mode="offline")
    with pytest.raises(UserError, match=r"profile.steps=9 is after the last step, train.steps=8"):
        tracing.check(ProfileConfig(steps=(2, 9)), "w", 8)
    with pytest.raises(UserError, match="wants a place for its traces"):
        tracing.check(ProfileConfig(steps=(2,)), None, 8)
    with pytest.raises(UserError, match=r"profile.steps counts from 1, got 0"):
        ProfileConfig(steps=(0,))


def test_goodput_is_the_share_of_time_in_steps(monkeypatch):
    clock = iter([100.0, 110.0, 120.0, 130.0, 140.0])
    monkeypatch.setattr("gemma4_jax.train.metrics.time.perf_counter", lambda: next(clock))
    row = dict.fromkeys(("loss", "ce", "accuracy", "tokens", "slots", "grad_norm", "learning_rate"), 1.0) | {"kl": 0.0}
    meter = Meter(10, 1.0, None, begun=80.0)
    meter.add({**row, "skipped": 0.0})
    values, line = meter.read(1)
    assert values["goodput"] == pytest.approx(10 / 30)  # 20 s of reading and compiling before
    meter.add({**row, "skipped": 0.0})
    meter.pause(5)
    values, line = meter.read(2)
    assert values["goodput"] == pytest.approx(15 / 40)
    assert values["peak_bytes"] > 1 << 20
    assert line.index("ETA") < line.index("goodput 38%") < line.index("peak ")  # what was there keeps its place


@pytest.fixture
def profiler(monkeypatch) -> list[Any]:
    """The calls that JAX's profiler gets."""
    calls: list[Any] = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda place: calls.append(("start", place)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    return calls


def run_steps(tracer: Tracer, numbers: range) -> None:
    for number in numbers:
        with tracer.step(number):
            pass
        tracer.done(number, None)


def test_traces_of_named_steps(tmp_path, profiler):
    said: list[str] = []
    tracer = Tracer(ProfileConfig(steps=(3, 7), length=2), tmp_path, said.append)
    run_steps(tracer, range(1, 8))
    tracer.close(7)
    assert profiler == [("start", str(tmp_path / "tensorboard")), "stop"] * 2
    assert [line.partition(":")[0] for line in said] == ["profiled steps 3 to 4", "profiled steps 7 to 7"]


def test_a_trace_of_a_run_that_goes_on(tmp_path, profiler, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now[0])
    said: list[str] = []
    tracer = Tracer(ProfileConfig(length=1, directory=str(tmp_path / "t")), tmp_path, said.append)
    run_steps(tracer, range(1, 3))
    (tmp_path / "profile").touch()
    run_steps(tracer, range(3, 5))
    assert said == []  # looked for once a second
    now[0] += 1
    run_steps(tracer, range(5, 7))
    assert [line.partition(":")[0] for line in said] == ["profiled steps 5 to 5"]
    assert profiler == [("start", str(tmp_path / "t")), "stop"]
    assert not (tmp_path / "profile").exists()


def run_directory(path: Path) -> Path:
    """Twelve steps in two processes, with everything a page has a place for; half an hour went by in between."""
    mapping = settings.defaults("sft").to_dict()
    mapping["train"] |= {"steps": 20, "remat": "full"}
    mapping |= {
        "workdir": str(path),
        "model": {"variant": "tiny_e2b"},
        "data": {**mapping["data"], "paths": ["a|b.jsonl"]},
    }
    path.mkdir()
    (path / "config_sft.json").write_text(json.dumps(mapping))
    (path / "checkpoints" / "12").mkdir(parents=True)
    (path / "bad_rows.jsonl").write_text('{"row": 1}\n')
    lines = []
    for step in range(1, 13):
        started, now = (1000.0, 1000.0 + 30 * step) if step <= 6 else (3000.0, 3000.0 + 30 * (step - 6))
        loss = math.nan if step == 5 else 4.0 / step
        train = {
            "loss": loss,
            "tokens_per_second": 900.0 + step,
            "seconds_per_step": 15.0,
            "kl": 0.0,
            "peak_bytes": 3 * 2**30,
        }
        train |= {"accuracy": step / 20, "skipped": float(step == 5)}
        lines.append({"step": step, **{f"train/{k}": v for k, v in train.items()}, "time": now, "started": started})
        if step % 6 == 0:
            lines.append({"step": step, "eval/loss": 5.0 / step, "time": now, "started": started})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "tr')
    samples = [{"step": s, "name": "samples", "text": f"samples: <em>{s}</em> & more"} for s in (6, 12)]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


def test_a_run_directory_becomes_a_page(tmp_path, capsys):
    path = run_directory(tmp_path / "run")
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.split() == [str(path / "report.html"), str(path / "report.md")]
    page, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    run = report.read(path)
    assert (run.steps, run.attempts, run.bad_rows, run.checkpoints) == (12, 2, 1, [12])
    assert run.seconds == pytest.approx(2180)
    assert run.goodput == pytest.approx(12 * 15 / 2180)
    assert run.changed["train.remat"] == ("full", "none")
    assert run.changed["train.steps"] == (20, 1000)
    assert "train.log_every" not in run.changed
    for said in (
        "12 of 20",
        "Loss",
        "Throughput",
        "Peak memory of a device",
        "3 GiB",
        "train.remat",
        "&lt;em&gt;12&lt;/em&gt; &amp; more",
    ):
        assert said in page
    assert "teacher" not in page  # a metric that is zero throughout has no plot
    assert "<em>" not in page
    for said in ("| steps | 12 of 20 |", "| train.remat | full | none |", "<em>12</em> & more", "a\\|b.jsonl"):
        assert said in text
    drawings = [
        ElementTree.fromstring(part + "</svg>")
        for part in page.split("<svg")[1:]
        for part in ["<svg" + part.partition("</svg>")[0]]
    ]
    assert len(drawings) == len(list(report_page.drawn(run))) == 5
    names = [title.text for title in drawings[0].iter("{http://www.w3.org/2000/svg}title")]
    assert "held-out, step 12: 0.4167" in names
    assert len(names) == 11 + 2  # eleven finite losses, two evaluations


def test_report_without_a_run(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "has no metrics.jsonl, so it is not the working directory of a training run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert report.main([str(tmp_path)]) == 2
    assert "has no complete line yet" in capsys.readouterr().err


def test_settings_of_an_unknown_version_are_all_shown(tmp_path):
    path = run_directory(tmp_path / "run")
    (path / "config_sft.json").write_text(json.dumps({"task": "rlhf", "a": {"b": 1}}))
    assert report.read(path).changed == {"a.b": (1, "")}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.31, 0.36, [0.3, 0.32, 0.34, 0.36]), (5, 5, None), (-3, 4, [-4, -2, 0, 2, 4])],
)
def test_ticks_are_round_and_hold_the_data(low, high, expected):
    found = ticks(low, high, 5)
    assert found[0] <= low
    assert high <= found[-1]
    assert 2 <= len(found) <= 7
    if expected is not None:
        assert found == pytest.approx(expected)


def test_a_long_series_keeps_its_peaks():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    drawing = line_chart([Series("loss", points)])
    assert "step 4,321: 99" in drawing
    assert drawing.count("<circle") <= 402
    with pytest.raises(ValueError, match="at least one finite point"):
        line_chart([Series("loss", [(1, math.nan)])])


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert len(sparkline(list(range(1000)))) == 40
    assert sparkline([math.nan]) == ""

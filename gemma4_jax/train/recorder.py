"""Where the numbers and texts of a run go: metrics.jsonl and samples.jsonl always, TensorBoard and Weights & Biases if wanted."""

import dataclasses
import importlib
import importlib.util
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma4_jax.errors import UserError
from gemma4_jax.options import option

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Who else gets to see a run, besides the files in its working directory."""

    tensorboard: bool = option(
        True, "event files in the working directory, for `tensorboard --logdir`", may_change=True
    )
    wandb: str | None = option(None, "project of Weights & Biases; needs `pip install wandb`", may_change=True)
    wandb_name: str | None = option(None, "of the run there; none: W&B makes one up", may_change=True)
    wandb_mode: Literal["online", "offline"] = option(
        "online", "offline: files in the working directory, for `wandb sync`", may_change=True
    )

    def __post_init__(self) -> None:
        if self.wandb is None and (self.wandb_name is not None or self.wandb_mode != "online"):
            raise UserError("track.wandb_name and track.wandb_mode belong to track.wandb=PROJECT, which is none.")


def check(track: TrackConfig) -> None:
    """UserError where a run would find out only after reading its weights that it cannot be tracked."""
    if track.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"track.wandb={track.wandb} needs Weights & Biases: pip install wandb, or set track.wandb=none."
        )


class Board(Protocol):
    """Something that shows a run while it goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """A few lines."""
        ...

    def close(self) -> None:
        """Writes what is still on its way."""
        ...


class Recorder:
    """Appends to `directory`/metrics.jsonl and samples.jsonl, and to boards; without a directory to W&B at most.

    Every line has its step, the time (seconds since 1970), and when its process started. A run that resumes at `step` drops what
    an earlier process wrote past it, so that every step stands there once.
    """

    def __init__(
        self,
        directory: Path | None,
        step: int,
        track: TrackConfig = TrackConfig(),
        settings: Mapping[str, Any] | None = None,
        *,
        speaks: bool = True,
        begun: float | None = None,
    ):
        """`speaks`: whether this process records, of several; `begun`: when it started, time.perf_counter; None: now."""
        self._directory = directory if speaks else None
        self._started = time.time() - (0.0 if begun is None else time.perf_counter() - begun)
        self._boards: list[Board] = []
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, SAMPLES):
                _drop_after(self._directory / name, step)
            if track.tensorboard:
                self._boards.append(TensorBoard(self._directory, step))
        if track.wandb is not None and speaks:
            self._boards.append(WeightsAndBiases(track, self._directory, settings or {}))

    def write(self, step: int, values: Mapping[str, float], prefix: str = "train") -> None:
        """Records `prefix`/name for every value."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        self._append(METRICS, step, named)
        for board in self._boards:
            board.scalars(step, named)

    def text(self, step: int, name: str, text: str) -> None:
        """Records a few lines, such as answers of the model."""
        self._append(SAMPLES, step, {"name": name, "text": text})
        for board in self._boards:
            board.text(step, name, text)

    def close(self) -> None:
        """Lets the boards finish."""
        for board in self._boards:
            board.close()

    def _append(self, file: str, step: int, row: Mapping[str, Any]) -> None:
        if self._directory is None:
            return
        when = {"time": round(time.time(), 3), "started": round(self._started, 3)}
        with (self._directory / file).open("a") as lines:
            lines.write(json.dumps({"step": step, **row, **when}) + "\n")


class TensorBoard:
    """Event files, without TensorFlow."""

    def __init__(self, directory: Path, step: int):
        from tensorboardX import SummaryWriter  # with protobuf, half a second

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As TensorBoard groups them: by what stands before the slash."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown, so lines are kept by four spaces."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """One run of W&B for all processes of ours that go on from each other: its id stays in `wandb_run`."""

    def __init__(self, track: TrackConfig, directory: Path | None, settings: Mapping[str, Any]):
        check(track)
        wandb = importlib.import_module("wandb")
        identity = None if directory is None else directory / "wandb_run"
        name = identity.read_text().strip() if identity is not None and identity.exists() else secrets.token_hex(4)
        if identity is not None:
            identity.write_text(name + "\n")
        self._run = wandb.init(
            project=track.wandb,
            name=track.wandb_name,
            mode=track.wandb_mode,
            id=name,
            resume="allow",
            dir=None if directory is None else str(directory),
            config=dict(settings),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter only goes up; a resumed run repeats steps

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of every curve."""
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """As HTML, which keeps lines."""
        from html import escape

        html = importlib.import_module("wandb").Html(f"<pre>{escape(text)}</pre>")
        self._run.log({"step": step, name: html})

    def close(self) -> None:
        """Waits for the upload."""
        self._run.finish()


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that a killed process left incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

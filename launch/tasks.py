"""Every task's program by name."""

from collections.abc import Callable
from typing import Any

from launch.answering import run_eval, run_sample
from launch.conversion import run_convert
from launch.exporting import run_export
from launch.plan import run_plan
from launch.training import run_training

TASKS: dict[str, Callable[[Any], Any]] = {
    "sft": run_training,
    "qat": run_training,
    "sample": run_sample,
    "eval": run_eval,
    "convert": run_convert,
    "export": run_export,
    "plan": run_plan,
}

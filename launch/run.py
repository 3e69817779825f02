"""`python -m launch.run --config=configs/NAME.py[:ARG] [--config.key=value ...]`: one config file, one task, one run.

A config file is Python with a `get_config()` that returns a ConfigDict; it is code, so run only files you trust. Exit codes:
0 done, 1 the run met something the user has to fix, 2 the command or the config is wrong, 75 told to end (SIGTERM) and saved: the
same command goes on, 76 ended by its own watchdog, 130 interrupted.
"""

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from gemma4_jax.errors import Preempted, UserError
from launch import cluster, settings
from launch.overrides import CommandLine, apply_overrides, read_command_line
from launch.record import keep_config, summary
from launch.usage import usage

PROJECT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str]) -> int:
    """The whole command; returns the exit code and prints any mistake as one sentence on stderr."""
    debug = "--debug" in arguments
    try:
        command = read_command_line(arguments)
        if command.config is None and (command.help or not command.overrides):
            print(usage(), flush=True)
            return 0
        run = read_run(command)
        if command.help:
            print(usage(run.task), flush=True)
            return 0
    except UserError as error:
        return _complain(error, 2, debug)
    except BrokenPipeError:  # `--help | head`: the reader has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    try:
        quiet_libraries()
        first = _meet(run) == 0
        if first:
            print(f"{run.task}  {command.config}\n{summary(run)}", flush=True)
        keep_config(run, write=first)
        from launch.tasks import TASKS  # the programs take seconds to import; a wrong key should not wait for them

        TASKS[run.task](run)
    except UserError as error:
        return _complain(error, 1, debug)
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        return 130
    except Preempted as error:
        print(f"launch: {error}; run the same command to go on", file=sys.stderr)
        return error.exit_code
    return 0


def read_run(command: CommandLine) -> settings.Run:
    """Config file, then overrides, then one check of everything."""
    if command.config is None:
        key = command.overrides[0][0]
        raise UserError(f"--config.{key} changes a config, but there is none; add --config=configs/NAME.py before it.")
    mapping = load_config(command.config)
    task = dict(command.overrides).get("task") or mapping.get("task")
    return settings.read(apply_overrides(mapping, command.overrides, settings.task_class(task)))


def load_config(spec: str) -> dict[str, Any]:
    """What `get_config(ARG)` of `NAME.py:ARG` returns, as nested dicts.

    A relative path is looked for in the working directory, then beside `launch/`, so that an installed copy finds its configs.
    """
    name, colon, argument = spec.partition(":")
    path = next((p for p in (Path(name), PROJECT / name) if p.is_file()), None)
    if path is None:
        known = sorted(p.name for p in (PROJECT / "configs").glob("*.py") if p.name != "__init__.py")
        raise UserError(f"There is no config file {name!r}; configs/ has {', '.join(known) or 'none'}.")
    try:
        get_config = _module(path).get_config
        wanted = list(inspect.signature(get_config).parameters.values())
        if not colon and wanted and wanted[0].default is inspect.Parameter.empty:
            wants = wanted[0].name.upper()
            raise UserError(f"{name} needs {wants} after a colon: --config={name}:{wants}.")
        if colon and not wanted:
            raise UserError(f"{name} takes nothing after a colon; got {argument!r}.")
        config = get_config(argument) if colon else get_config()
    except UserError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.resolve())]
        line = f" line {frames[-1].lineno}" if frames else ""
        raise UserError(f"{name}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"{name}: get_config() must return a ConfigDict, got {type(config).__name__}.")
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _meet(run: settings.Run) -> int:
    """Which process of its run this is: training finds the others by itself, tasks that ask a model refuse to be several."""
    if isinstance(run, settings.SampleRun | settings.EvalRun):
        cluster.refuse_several(run.task)
    if not isinstance(run, settings.TrainRun) or (others := cluster.of_run(run.processes)) is None:
        return 0  # without JAX, which takes seconds to import
    from launch.processes import join

    return join(run.processes, others)


def quiet_libraries() -> None:
    """Grain and Orbax read absl flags and log every step of a save; nobody else parses their flags here."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    absl_logging.set_verbosity(absl_logging.WARNING)


def _complain(error: UserError, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"launch: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

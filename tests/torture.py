"""`python -m tests.torture [WHAT ...]`: kills, notices, stopped peers, changed bits and broken files, many times over.

Every promise of RELIABILITY.md with its figure: how often it was tried, and how often it held. `make torture` runs all of it, about
an hour on two cores. Exit code 1 if anything did not hold.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
SIZES = {"num_hidden_layers": 6, "hidden_size_per_layer_input": 0, "hidden_size": 64, "intermediate_size": 64}
STEPS, SAVE_EVERY = 60, 3
STEP_LINE = r"\nstep +(\d+)/"
OPTIONS = [
    "--config=configs/tiny_sft.py",
    "--config.model.variant=tiny_31b",
    "--config.eval_data=none",
    "--config.data.batch_size=2",
    "--config.train.grad_accum=1",
    "--config.train.log_every=1",
    f"--config.train.steps={STEPS}",
    f"--config.train.save_every={SAVE_EVERY}",
    "--config.train.eval_every=0",
    "--config.train.sample_every=0",
    "--config.optim.warmup_steps=1",
    *(f"--config.model.overrides.{key}={value}" for key, value in SIZES.items()),
]


class Failure(Exception):
    """A promise that did not hold."""


class Run:
    """One or two processes of one training run, with what they have said so far."""

    def __init__(self, workdir: Path, count: int, *options: str):
        self.workdir, self.count = workdir, count
        where = []
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            where = [f"--config.processes.coordinator=localhost:{port}", f"--config.processes.count={count}"]
            where.append("--config.processes.heartbeat_seconds=10")
        self.logs = [workdir.parent / f"{workdir.name}.{index}.log" for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            command = [sys.executable, "-m", "launch.run", *OPTIONS, f"--config.workdir={workdir}", *options, *where]
            command += [f"--config.processes.index={index}"] * (count > 1)
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT))

    def said(self) -> str:
        return self.logs[0].read_text()

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 300) -> None:
        """Returns when process 0 has said `pattern` so often, or any process has ended."""
        end = time.monotonic() + seconds
        while len(re.findall(pattern, self.said())) < times and all(
            process.poll() is None for process in self.processes
        ):
            if time.monotonic() > end:
                raise Failure(f"nobody said {pattern!r} in {seconds} s; last words: {self.said()[-300:]}")
            time.sleep(0.05)

    def wait(self, seconds: float = 1200) -> list[int]:
        """Exit codes."""
        try:
            return [process.wait(timeout=seconds) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"the run did not end in {seconds} s; last words: {self.said()[-300:]}") from None

    def kill(self, which: tuple[int, ...] = (0, 1)) -> None:
        for index, process in enumerate(self.processes):
            if index in which:
                process.kill()

    def numbers(self, pattern: str) -> list[int]:
        return [int(found) for found in re.findall(pattern, self.said())]


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "torture-cache")
        yield Path(name)


def committed(workdir: Path) -> list[int]:
    from gemma4_jax.checkpoint.steps import absolute, committed_steps

    return committed_steps(absolute(workdir / "checkpoints"))


def check_steps(workdir: Path) -> None:
    """Every committed step is as it was written."""
    from gemma4_jax.checkpoint.steps import absolute
    from gemma4_jax.checkpoint.verified import damage

    for step in committed(workdir):
        if found := damage(absolute(workdir / "checkpoints" / str(step))):
            raise Failure(found)


def last_digests(workdir: Path) -> dict[str, str]:
    from gemma4_jax.checkpoint.steps import absolute
    from gemma4_jax.checkpoint.verified import array_digests

    return array_digests(absolute(workdir / "checkpoints" / str(max(committed(workdir)))))


def uninterrupted(root: Path, count: int, *options: str) -> dict[str, str]:
    run = Run(root / f"whole{count}", count, *options)
    if any(run.wait()):
        raise Failure(f"the uninterrupted run failed: {run.said()[-500:]}")
    return last_digests(run.workdir)


def kills(times: int, seed: int) -> str:
    """SIGKILL at random moments, of one process and of one or both of two; then the end is compared bit for bit."""
    generator, done = random.Random(seed), 0
    with directory() as root:
        for count in (1, 2):
            wanted = uninterrupted(root, count)
            workdir, safe, begun = root / f"cut{count}", 0, 0
            for _ in range(times // 2):
                run = Run(workdir, count)
                # Moments are told by steps, not by the clock: a slow machine is killed while it saves too.
                if generator.random() < 0.2:
                    run.wait_for("ready in")
                else:
                    run.wait_for("compiled the step")
                    run.wait_for(STEP_LINE, generator.randrange(2 * SAVE_EVERY + 2))
                time.sleep(generator.uniform(0, 0.5))
                which = generator.choice([(0, 1), (0,), (1,)]) if count > 1 else (0,)
                run.kill(which)
                run.wait(60)  # the survivor ends within the heartbeat
                resumed = run.numbers(r"resumed after step (\d+)")
                if resumed and resumed[0] < safe:
                    raise Failure(f"resumed after step {resumed[0]}, though step {safe} was committed")
                safe = max([safe, *run.numbers(r"committed step (\d+)")])
                begun = max([begun, *run.numbers(STEP_LINE)])
                newest = max(committed(workdir), default=0)
                if newest < safe:
                    raise Failure(f"step {safe} was called committed, and the newest is {newest}")
                check_steps(workdir)
                done += 1
                print(
                    f"  kill {done}: {count} process(es), {which}, step {begun}, newest committed {newest}", flush=True
                )
                if newest == STEPS:  # it got to the end: begin again
                    _same(workdir, wanted)
                    shutil.rmtree(workdir)
                    safe = begun = 0
            run = Run(workdir, count)
            if any(run.wait()):
                raise Failure(run.said()[-500:])
            _same(workdir, wanted)
    return f"{done} kills: every restart went on from the newest committed step, every digest matched, the end equal bit for bit"


def _same(workdir: Path, wanted: dict[str, str]) -> None:
    if last_digests(workdir) != wanted:
        raise Failure(f"{workdir.name}: the last state differs from that of the uninterrupted run")


def notices(times: int, seed: int) -> str:
    """SIGTERM in every phase, to one process or one of two: all save the same step and end with 75; then they go on."""
    generator, done = random.Random(seed), 0
    phases = [("ready in", 1), ("compiled the step", 1), (STEP_LINE, 1), ("committed step", 1), (STEP_LINE, 10)]
    # Processes agree on the step in about a second: there must be steps left when they have.
    steps = 10 * STEPS
    longer = f"--config.train.steps={steps}"
    with directory() as root:
        for count in (1, 2):
            wanted = uninterrupted(root, count, longer)
            workdir = root / f"told{count}"
            for phase, often in phases * (-(-times // (2 * len(phases)))):
                run = Run(workdir, count, longer)
                run.wait_for(phase, often)
                time.sleep(generator.uniform(0, 0.3))
                told = run.processes[generator.randrange(count)]
                told.send_signal(signal.SIGTERM)
                if generator.random() < 0.5:
                    told.send_signal(signal.SIGTERM)
                codes = run.wait(120)
                newest = max(committed(workdir), default=0)
                early = phase == "ready in" and codes[0] in (-signal.SIGTERM, 143)  # before it listens: nothing to save
                if not early and codes != [75] * count and newest != steps:
                    raise Failure(f"{phase!r}: exit codes {codes}; {run.said()[-500:]}")
                check_steps(workdir)
                done += 1
                print(
                    f"  notice {done}: {count} process(es), at {often} x {phase!r}, codes {codes}, committed {newest}",
                    flush=True,
                )
                if newest == steps:
                    _same(workdir, wanted)
                    shutil.rmtree(workdir)
            run = Run(workdir, count, longer)
            if any(run.wait()):
                raise Failure(run.said()[-500:])
            _same(workdir, wanted)
    return f"{done} notices: {done} clean resumes, the end equal bit for bit"


def stopped(times: int, seed: int) -> str:
    """SIGSTOP of one of two processes: the watchdog of the other ends it in time, with stacks."""
    longest = 0.0
    with directory() as root:
        for number in range(times):
            run = Run(
                root / f"stop{number}", 2, "--config.train.stall_seconds=8", f"--config.train.steps={100 * STEPS}"
            )
            run.wait_for(STEP_LINE, 5)
            victim = run.processes[(seed + number) % 2]
            victim.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            other = run.processes[(seed + number + 1) % 2]
            code = other.wait(timeout=60)
            longest = max(longest, time.monotonic() - began)
            victim.kill()
            log = run.logs[run.processes.index(other)].read_text()
            if code != 76 and "unhealthy" not in log and "heartbeat" not in log.lower():
                raise Failure(f"the survivor ended with {code}: {log[-300:]}")
            print(
                f"  stop {number + 1}: the other ended with {code} after {time.monotonic() - began:.1f} s", flush=True
            )
    return f"{times} stopped peers: the other process ended within {longest:.0f} s (limit 8 s, heartbeat 10 s)"


def flips(times: int, seed: int) -> str:
    """Single bits, and truncated, missing and swapped files: each is found on restore, and named."""
    import jax
    import jax.numpy as jnp

    from gemma4_jax.checkpoint.store import Store
    from gemma4_jax.errors import UserError

    key = jax.random.key(seed)
    state = {
        "step": jnp.int32(5),
        **{
            f"params.layer{i}.w": jax.random.normal(jax.random.fold_in(key, i), (128, 96), jnp.bfloat16)
            for i in range(6)
        },
        **{f"opt.mu.layer{i}.w": jax.random.normal(jax.random.fold_in(key, 9 + i), (128, 96)) for i in range(6)},
    }
    generator, named = random.Random(seed), 0
    with directory() as root:
        with Store(root / "run") as store:
            store.save(5, state, {"data": {}})
        step = root / "run" / "5"
        files = [
            path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size and path.parent != step
        ]
        data = [path for path in files if path.parent.name == "d"]
        sizes = [path.stat().st_size for path in data]

        def refused(spoil: Callable[[Path], None], path: Path) -> str:
            kept = path.read_bytes()
            others = {other: other.read_bytes() for other in files}
            spoil(path)
            try:
                with Store(root / "run") as store:
                    store.restore(5, state)
            except UserError as error:
                return str(error)
            finally:
                path.write_bytes(kept)
                for other, content in others.items():
                    other.write_bytes(content)
            raise Failure(f"{path.name}: nobody noticed")

        def flip(path: Path) -> None:
            content = bytearray(path.read_bytes())
            bit = generator.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)

        def swap(path: Path) -> None:
            other = generator.choice([each for each in files if each.read_bytes() != path.read_bytes()])
            one, two = path.read_bytes(), other.read_bytes()
            path.write_bytes(two)
            other.write_bytes(one)

        for _ in range(times):
            path = generator.choices(data, sizes)[0]
            message = refused(flip, path)
            if path.name not in message:
                raise Failure(f"{path.name} is not named in: {message}")
            named += "arrays: " in message
        for number in range(30):
            path = files[number % len(files)]
            ways = (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), Path.unlink, swap)
            message = refused(ways[number % 3], path)
            if path.name not in message:
                raise Failure(f"{path.name} is not named in: {message}")
    return f"{times} flipped bits found, files named in all, arrays in {named}; 30 truncations, deletions, swaps named"


WHAT: dict[str, tuple[Callable[[int, int], str], int]] = {
    "flips": (flips, 200),
    "stopped": (stopped, 4),
    "notices": (notices, 10),
    "kills": (kills, 40),
}


def main() -> int:
    """Runs what was asked for, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(WHAT)}; default: all")
    parser.add_argument("--times", type=int, help="instead of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in WHAT]:
        parser.error(f"{', '.join(unknown)}: wanted {', '.join(WHAT)}")
    bad = 0
    for name in options.what or WHAT:
        run, times = WHAT[name]
        began = time.monotonic()
        print(f"{name}: {(run.__doc__ or '').strip()}", flush=True)
        try:
            result = run(options.times or times, options.seed)
        except Failure as failure:
            result, bad = f"FAILED: {failure}", 1
        print(f"{name}: {result} ({time.monotonic() - began:.0f} s)", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())

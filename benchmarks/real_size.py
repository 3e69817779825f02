"""A real-size E2B with random bfloat16 weights loads and answers here: seconds, tokens/s and peak memory.

    python -m benchmarks.real_size [--variant e2b] [--tokens 16] [--packed q4_0] [--home DIR]

With `--packed` the weights are rounded to that policy's grids and stay codes in memory (`sample.packed`). Needs 10 GB of disk in
DIR (by default the directory for temporary files), free again afterwards. The answering is a process of its own, so that the peak
is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.export import write_checkpoint
from benchmarks.worker import peak_gb, resident_gb
from gemma4_jax.config import VARIANTS
from gemma4_jax.quant.policies import POLICIES, PolicyName
from gemma4_jax.tables import table

PROMPT = 32


def main() -> None:
    """Writes the checkpoint, answers, prints one table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="e2b")
    parser.add_argument("--tokens", type=int, default=16, help="of the answer")
    parser.add_argument(
        "--packed", choices=POLICIES, help="answer from codes of this policy; default: from the float weights"
    )
    parser.add_argument("--home", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--one", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(answer(Path(options.one), options.tokens, options.packed)))
        return
    with tempfile.TemporaryDirectory(dir=options.home) as home:
        write_checkpoint(options.variant, Path(home) / "source")
        command = (sys.executable, "-m", "benchmarks.real_size", "--one", f"{home}/source")
        command += ("--tokens", str(options.tokens), *(("--packed", options.packed) if options.packed else ()))
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    one = json.loads(done.stdout.splitlines()[-1])
    header = ("variant", "loading s", "first answer s", "again s", "tokens/s", "resident GiB", "peak GiB")
    print(table(header, [(options.variant, *(f"{one[key]:.2f}" for key in list(one)))]))


def answer(checkpoint: Path, count: int, packed: PolicyName | None) -> dict[str, float]:
    """Loads as the launcher does, and answers the same prompt twice: the first compiles."""
    from gemma4_jax.checkpoint.load import load
    from gemma4_jax.infer.engine import Engine
    from gemma4_jax.infer.request import Request
    from gemma4_jax.infer.sampler import Rule
    from gemma4_jax.quant.policy import QuantConfig, apply

    started = time.perf_counter()
    model = load(checkpoint)
    if packed is not None:
        model = apply(model, QuantConfig(policy=packed, activations="none", kv_cache="none"))
    engine = Engine(model, slots=1, max_length=PROMPT + count, consume=True, packed=packed is not None)
    del model
    loaded = time.perf_counter()
    prompt = np.random.default_rng(0).integers(3, engine.cfg.vocab_size, PROMPT).tolist()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        running = engine.submit(Request(prompt, count, Rule(temperature=0.0)))
        while engine.step():
            pass
        assert len(running.tokens) == count
        seconds.append(time.perf_counter() - began)
    return {
        "load": loaded - started,
        "first": seconds[0],
        "again": seconds[1],
        "speed": count / seconds[1],
        "resident": (resident_gb() or 0.0) * 1e9 / 2**30,
        "peak": (peak_gb() or 0.0) * 1e9 / 2**30,
    }


if __name__ == "__main__":
    main()

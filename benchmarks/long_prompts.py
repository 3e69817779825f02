"""Memory and time of long prompts: `python -m benchmarks.long_prompts [--variant tiny_e2b] [--lengths 4096 8192 ...]`.

Each length is read by a process of its own. The cache is there before; "more" is how far resident memory rises above that while the
prompt is read, what of the cache was never touched before included. A quadratic buffer of 32,768 tokens would be 4.3 GB a head.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gemma4_jax.tables import table

LENGTHS = (4096, 8192, 16384, 32768)


def read_one(variant: str, length: int) -> dict:
    """Reads a prompt of random tokens and writes two; bytes of the cache, most bytes above what was held before, seconds."""
    from benchmarks.worker import peak_gb, resident_gb
    from gemma4_jax.config import ModelConfig
    from gemma4_jax.infer.engine import Engine
    from gemma4_jax.infer.request import Request
    from gemma4_jax.infer.sampler import Rule
    from gemma4_jax.model.kv import total_bytes
    from gemma4_jax.model.transformer import init

    cfg = ModelConfig.variant(variant, max_position_embeddings=length + 512)
    engine = Engine(init(cfg), slots=1, max_length=length + 8)
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, length)

    def ask(count: int) -> float:
        start = time.perf_counter()
        running = engine.submit(Request(tokens[:count].tolist(), 2, Rule(temperature=0.0)))
        while engine.step():
            pass
        assert len(running.tokens) == 2
        return time.perf_counter() - start

    engine.reserve(length + 8)
    ask(1000)  # compiles
    before = (resident_gb() or 0.0) * 1e9
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = ask(length)
    cache = total_bytes(engine._cache) if engine._cache is not None else 0
    return {"length": length, "peak": (peak_gb() or 0.0) * 1e9 - before, "cache": cache, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompts")
    parser.add_argument("--variant", default="tiny_e2b")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--one", type=int, help="read this length here, and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(read_one(options.variant, options.one)))
        return
    rows = []
    for length in options.lengths:
        command = (sys.executable, "-m", "benchmarks.long_prompts", "--variant", options.variant, "--one", str(length))
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)  # noqa: S603
        one = json.loads(done.stdout.splitlines()[-1])
        sizes = f"{one['cache'] / 1e6:.1f}", f"{one['peak'] / 1e6:.1f}"
        rows.append((f"{length:,}", *sizes, f"{length / one['seconds']:,.0f}"))
        print(json.dumps(one), flush=True)
    print(table(("tokens", "cache MB", "more MB", "tokens/s"), rows))


if __name__ == "__main__":
    main()

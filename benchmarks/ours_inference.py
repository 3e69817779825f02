"""Our side, `python -m benchmarks.ours_inference CHECKPOINT`: every measure once for every line of stdin."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.worker import peak_gb
from gemma4_jax.checkpoint.hf import load_hf
from gemma4_jax.infer.cache import request_bytes
from gemma4_jax.infer.engine import Engine
from gemma4_jax.infer.request import Request, Running
from gemma4_jax.infer.sampler import Rule


def main(checkpoint: Path) -> None:
    """The engine as the Sampler uses it, with 8 slots; the checkpoint's dtype. The first line also compiles."""
    dtype = json.loads((checkpoint / "config.json").read_text()).get("dtype", "float32")
    model = load_hf(checkpoint, dtype=dtype)
    prompts = np.load(checkpoint / "prompts.npz")
    new = int(prompts["new"])
    longest = prompts["prefill"].shape[1]
    engine = Engine(model, slots=8, max_length=longest + new + 1, consume=True)
    cache = request_bytes(engine.cfg, longest, str(engine._ready().compute_dtype), engine.format)
    engine.reserve(longest + new + 1)

    def ask(tokens: np.ndarray, count: int) -> list[Running]:
        return [engine.submit(Request(row.tolist(), count, Rule(temperature=0.0))) for row in tokens]

    def finish() -> float:
        start = time.perf_counter()
        while engine.step():
            pass
        return time.perf_counter() - start

    def decoding(tokens: np.ndarray) -> tuple[float, list[list[int]]]:
        """Seconds of a step in which every row writes a token, and the tokens."""
        running = ask(tokens, new + 1)
        while any(not one.tokens for one in running):
            engine.step(soon=True)
        begun = max(len(one.tokens) for one in running)
        seconds = finish()
        return seconds / (new + 1 - begun), [one.tokens for one in running]

    def measure() -> dict:
        ask(prompts["prefill"], 1)
        first = finish()
        one, tokens = decoding(prompts["decode1"])
        eight, more = decoding(prompts["decode8"])
        # The engine's prefill ends with the first token, so both are one measure.
        return {
            "prefill_s": first,
            "first_token_s": first,
            "decode1_s": one,
            "decode8_s": eight,
            "tokens": tokens + more,
        }

    facts = {"version": f"jax {jax.__version__}, {dtype}", "cache_bytes": cache.total}
    for _ in sys.stdin:
        print(json.dumps({**facts, **measure(), "peak_gb": peak_gb()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

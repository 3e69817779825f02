"""The peer's side, in an environment with torch: `PYTHON -m benchmarks.peer_transformers_inference CHECKPOINT`."""
# pyright: reportMissingImports=false

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.worker import peak_gb


def main(checkpoint: Path) -> None:
    """Threads, attention, experts and cache as torch and transformers choose them; only the last token's logits are computed."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    dtype = json.loads((checkpoint / "config.json").read_text()).get("dtype", "float32")
    model, loading = load(checkpoint, dtype=getattr(torch, dtype), output_loading_info=True)
    if any(loading.values()):
        sys.exit(f"transformers loads the checkpoint only in part: {loading}")
    model.eval()
    prompts = np.load(checkpoint / "prompts.npz")
    new = int(prompts["new"])

    def forward(tokens: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def prefill() -> tuple[float, float, int]:
        """Seconds up to the logits, up to the first token by `generate`, and bytes of the cache."""
        tokens = torch.from_numpy(prompts["prefill"])
        cache = transformers.DynamicCache(config=model.config)
        start = time.perf_counter()
        forward(tokens, cache)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False, eos_token_id=None
        )
        first = time.perf_counter() - start
        arrays = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
        return seconds, first, sum(x.numel() * x.element_size() for x in arrays)

    def decoding(tokens: np.ndarray) -> tuple[float, list[list[int]]]:
        """Seconds of a step, and the tokens."""
        cache = transformers.DynamicCache(config=model.config)
        newest = forward(torch.from_numpy(tokens), cache)
        written = [newest]
        start = time.perf_counter()
        for _ in range(new):
            newest = forward(newest, cache)
            written.append(newest)
        return (time.perf_counter() - start) / new, torch.cat(written, dim=1).tolist()

    def measure() -> dict:
        with torch.no_grad():
            seconds, first, size = prefill()
            one, tokens = decoding(prompts["decode1"])
            eight, more = decoding(prompts["decode8"])
        times = {"prefill_s": seconds, "first_token_s": first, "decode1_s": one, "decode8_s": eight}
        return {**times, "cache_bytes": size, "tokens": tokens + more}

    threads = f"{torch.get_num_threads()} threads"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}, {threads}, {dtype}"
    for _ in sys.stdin:
        print(json.dumps({"version": version, **measure(), "peak_gb": peak_gb()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

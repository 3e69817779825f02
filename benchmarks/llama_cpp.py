"""llama.cpp against our sampler on the same tiny models, trained on real text with the real tokenizer and exported as GGUF.

For each variant: a model of its structure is trained on GSM8K with fake-quantised weights (policy q4_0), exported to Q4_0 and,
rounded, to float GGUF, and llama.cpp (the `xllamacpp` wheel) continues 200 prefixes of held-out questions by one greedy token. Its
matrix products round activations to 8 bits where weights are Q4_0, so a few near-ties differ; with float weights they should not.

    python -m benchmarks.llama_cpp [--models e2b e4b 26b_a4b 31b] [--steps 150] [--save]

Needs the parity extra and ../shared/data; about five minutes a model on two cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import keep
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.config import ModelConfig
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.model.parameters import arrays, with_arrays
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.quant import policy
from gemma4_jax.tables import table
from gemma4_jax.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VARIANTS = ("e2b", "e4b", "26b_a4b", "31b")
BATCH, LENGTH, PROMPTS, TOP = 2, 64, 200, 10
FROZEN = "per_layer.table.w"
"""A table of 126 million weights that a few steps would hardly touch: left as drawn, for memory's sake."""


def main() -> None:
    """Trains, exports, compares and prints one table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_cpp", description="Greedy tokens beside llama.cpp."
    )
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results")
    options = parser.parse_args()
    tokenizer_file = DATA / "tokenizer_gemma4.model"
    if not tokenizer_file.is_file():
        parser.exit(1, f"benchmarks: the real tokenizer and data are not in {DATA}\n")
    tokenizer = Tokenizer.load(tokenizer_file)
    train, held_out = (_tokens(tokenizer, f"gsm8k_{part}.jsonl") for part in ("train", "test"))
    prompts, load = _prompts(held_out), os.getloadavg()[0]
    records = []
    for variant in options.models:
        with tempfile.TemporaryDirectory() as home:
            command = f"python -m benchmarks.llama_cpp --models {variant} --steps {options.steps}"
            for record in _compare(variant, options.steps, train, prompts, tokenizer_file, Path(home)):
                records.append({"command": command, "prompts": PROMPTS, **record})
                print(json.dumps(record), flush=True)
    header = ("model", "stored as", "same greedy token", "mean logprob difference", "largest", "loss")
    rows = [
        (
            r["model"],
            r["stored_as"],
            f"{100 * r['same']:.1f} %",
            r["mean_difference"],
            r["largest_difference"],
            r["loss"],
        )
        for r in records
    ]
    print(table(header, rows))
    if options.save:
        keep.save("llama_cpp", records, load)


def _compare(
    variant: str, steps: int, train: np.ndarray, prompts: list[list[int]], tokenizer: Path, home: Path
) -> list[dict[str, Any]]:
    """One record per GGUF file of a freshly trained model."""
    cfg = ModelConfig.variant(f"tiny_{variant}", vocab_size=262144, vocab_size_per_layer_input=262144)
    model = policy.apply(init(cfg, 0, "float32"), policy.QuantConfig(policy="q4_0"))
    started = time.perf_counter()
    model, loss = _train(model, train, steps)
    print(f"{variant}: loss {loss:.3f} after {steps} steps, {time.perf_counter() - started:.0f} s", flush=True)
    ours = _our_logprobs(model, prompts)
    sampler = Sampler(model, None, max_length=LENGTH + 1, batch_size=50)
    done = sampler.generate(prompts, max_new_tokens=1, temperature=0.0, stop=[])
    tokens = [completion.tokens[0] for completion in done]
    found = []
    for label, exported in (("Q4_0", model), ("F32", policy.snap(model))):
        file = home / f"{variant}_{label}.gguf"
        report = export(exported, file, format="gguf", dtype="float32", tokenizer=tokenizer)
        theirs = _their_logprobs(file, prompts)
        best = [max(given, key=lambda token: given[token]) for given in theirs]
        gaps = [
            abs(given[token] - float(row[token])) for given, row in zip(theirs, ours, strict=True) for token in given
        ]
        same = float(np.mean([a == b for a, b in zip(best, tokens, strict=True)]))
        found.append(
            {
                "model": variant,
                "stored_as": label,
                "same": same,
                "mean_difference": float(np.mean(gaps)),
                "largest_difference": float(np.max(gaps)),
                "loss": loss,
                "distinct_tokens": len(set(tokens)),
                "file_mb": report.bytes / 1e6,
            }
        )
        file.unlink()
    return found


def _tokens(tokenizer: Tokenizer, name: str) -> np.ndarray:
    """Rows of LENGTH tokens, each a question from its start."""
    rows = []
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        ids = tokenizer.encode(f"{item['question']}\n{item['answer']}", add_bos=True)
        if len(ids) >= LENGTH:
            rows.append(ids[:LENGTH])
    return np.array(rows, np.int32)


def _prompts(rows: np.ndarray) -> list[list[int]]:
    """PROMPTS prefixes of different rows and lengths."""
    lengths = np.random.default_rng(0).integers(8, LENGTH, PROMPTS)
    return [rows[i][: lengths[i]].tolist() for i in range(PROMPTS)]


def _train(model: Transformer, rows: np.ndarray, steps: int) -> tuple[Transformer, float]:
    """Plain next-token training; a bare loop, because only the export is looked at here."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    weights, kept = arrays(model), {}
    if FROZEN in weights:
        kept = {FROZEN: weights.pop(FROZEN)}

    def loss_of(weights: dict[str, jax.Array], kept: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(with_arrays(model, weights | kept)(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    def step(weights: Any, kept: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(weights, kept, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state, loss

    compiled, state = jax.jit(step, donate_argnums=(0, 2)), optimizer.init(weights)
    order, losses = np.random.default_rng(1), []
    for _ in range(steps):
        tokens = jnp.asarray(rows[order.integers(0, len(rows), BATCH)])
        weights, state, loss = compiled(weights, kept, state, tokens)
        losses.append(float(loss))
    return with_arrays(model, weights | kept), float(np.mean(losses[-10:]))


def _our_logprobs(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """log p of the next token after each prompt."""
    last = jax.jit(lambda model, tokens, at: jax.nn.log_softmax(model(tokens)[jnp.arange(len(tokens)), at]))
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), 10):
        part = prompts[start : start + 10]
        tokens = np.zeros((len(part), LENGTH), np.int32)
        for row, prompt in enumerate(part):
            tokens[row, : len(prompt)] = prompt
        found += list(np.asarray(last(model, jnp.asarray(tokens), jnp.asarray([len(p) - 1 for p in part]))))
    return found


def _their_logprobs(file: Path, prompts: Sequence[Sequence[int]]) -> list[dict[int, float]]:
    """Of each prompt llama.cpp's likeliest tokens and their log p."""
    import xllamacpp  # pyright: ignore[reportMissingImports]  # of the parity extra

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 4 * LENGTH, 1, False
    parameters.cpuparams.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(parameters)
    found = []
    for prompt in prompts:
        asked = {"prompt": list(prompt), "n_predict": 1, "temperature": 0.0, "n_probs": TOP, "cache_prompt": False}
        answer: Any = server.handle_completions(asked)
        first = answer["choices"][0]["logprobs"]["content"][0]
        found.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
    return found


if __name__ == "__main__":
    main()

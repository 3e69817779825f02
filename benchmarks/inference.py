"""Prefill, decoding and caches beside peers on the same weights, and beside what the memory of this machine allows.

    python -m benchmarks.inference [--quick] [--models dense moe] [--turns N] [--peer NAME=PYTHON ...] [--save]

The sides are processes of their own that take turns (`worker.py`); each turn is every measure once, after one that compiles.
First all must write the same greedy tokens. The limit of a decoding step is the bytes it cannot do without (weights, of
experts those that are chosen, and keys and values of the tokens there are) over this machine's bandwidth, which is measured by
summing an array too large for any cache with all cores.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import keep
from benchmarks.train import MODELS
from benchmarks.worker import Answer, add_peers, given_peers, worker
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.cache import request_bytes
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.transformer import abstract, init
from gemma4_jax.tables import table

QUICK = dict(vocab_size=512, hidden_size=64, head_dim=16, global_head_dim=32, sliding_window=16)
PLAN = {"prefill": 1024, "prompt": 32, "new": 64}
QUICK_PLAN = {"prefill": 64, "prompt": 8, "new": 8}
BATCHES = (1, 8)
PEERS = {
    "transformers": "benchmarks.peer_transformers_inference",
    "tunix": "benchmarks.peer_tunix_inference",
    "gemma": "benchmarks.peer_gemma_inference",
}
"""What a peer is called on the command line, and its side."""
WANTED = {"prefill_s": 1.5, "first_token_s": 1.5, "decode1_s": 2.0, "decode8_s": 2.5}
"""Times as fast as JAX peers that this project means to be."""
OF_TRANSFORMERS = WANTED | {"prefill_s": 1.2, "first_token_s": 1.2}
"""The same for transformers, whose prefill computes only the last token's logits."""


def compare(names: list[str], *, quick: bool, turns: int, peers: dict[str, Path], dtype: str, save: bool) -> None:
    """Prints a table of medians and one of ratios; UserError if the sides write different tokens."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    busy = "; TOO BUSY for the numbers to mean much" * (load > 0.75 * cores)
    bandwidth = memory_bandwidth(cores)
    print(f"{cores} cores, load average {load:.2f}{busy}; memory {bandwidth / 1e9:.1f} GB/s", flush=True)
    sides = {"gemma4_jax": (sys.executable, "benchmarks.ours_inference")}
    sides |= {name: (str(python.absolute()), PEERS[name]) for name, python in peers.items()}
    records = []
    for name in names:
        command = f"python -m benchmarks.inference{' --quick' * quick} --models {name} --turns {turns} --dtype {dtype}"
        command += "".join(f" --peer {peer}=PYTHON" for peer in peers)
        measured = _measure(name, quick, turns, sides, dtype, bandwidth)
        records += [{"command": command, "bandwidth": bandwidth, **record} for record in measured]
    print(
        table(
            ("model", "by", "prefill s", "first token s", "decode 1", "decode 8", "cache MB"),
            [_row(record) for record in records],
        )
    )
    for name in names:
        print(*_ratios([record for record in records if record["model"] == name]), sep="\n")
    print(*dict.fromkeys(f"{record['by']}: {record['version']}" for record in records), sep="\n")
    if save:
        keep.save("inference_quick" if quick else "inference", records, load)


def _measure(
    name: str, quick: bool, turns: int, sides: dict[str, tuple[str, str]], dtype: str, bandwidth: float
) -> list[Answer]:
    variant, sizes = MODELS[name]
    cfg = ModelConfig.variant(variant, **sizes | (QUICK if quick else {}))
    plan = QUICK_PLAN if quick else PLAN
    rng = np.random.default_rng(0)
    prompts = {
        "prefill": rng.integers(3, cfg.vocab_size, (1, plan["prefill"])),
        **{f"decode{batch}": rng.integers(3, cfg.vocab_size, (batch, plan["prompt"])) for batch in BATCHES},
    }
    with contextlib.ExitStack() as stack:
        checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_hf(init(cfg), checkpoint, dtype=dtype)
        arrays: dict[str, Any] = {**prompts, "new": np.int64(plan["new"])}
        np.savez(checkpoint / "prompts.npz", **arrays)
        step = {by: stack.enter_context(worker(*side, checkpoint)) for by, side in sides.items()}
        first = {by: step[by]() for by in sides}
        _same_tokens(name, {by: answer["tokens"] for by, answer in first.items()}, exact=dtype == "float32")
        answers: dict[str, list[Answer]] = {by: [] for by in sides}
        for turn in range(turns):
            for by in list(sides)[:: 1 if turn % 2 else -1]:
                answers[by].append(step[by]())
    limits = {batch: decode_bytes(cfg, batch, plan["prompt"] + plan["new"] // 2) / bandwidth for batch in BATCHES}
    records = []
    for by, found in answers.items():
        medians = {key: statistics.median(answer[key] for answer in found) for key in WANTED}
        facts = {key: found[-1][key] for key in ("version", "cache_bytes", "peak_gb")}
        times = {key: [answer[key] for answer in found] for key in WANTED}
        limit = {f"limit{batch}_s": limits[batch] for batch in BATCHES}
        records.append({"model": name, "by": by, "dtype": dtype, **facts, **medians, **limit, "times": times})
    return records


def _same_tokens(name: str, tokens: dict[str, list[list[int]]], *, exact: bool) -> None:
    """UserError unless the sides agree on most tokens; of bfloat16, on many of the rows' first ones.

    With random weights two tokens are nearly as likely now and then, and rounding decides; from there on a row goes another way.
    Other weights or a wrong layer agree on none of a vocabulary of thousands. bfloat16 activations of the other side are another
    rounding at every step.
    """
    ours, *others = (np.asarray(rows)[:, : None if exact else 1] for rows in tokens.values())
    for theirs in others:
        agree = np.mean(ours == theirs)
        if agree < (least := 0.7 if exact else 0.3):
            raise UserError(
                f"{name}: {agree:.0%} of the greedy tokens of both sides are the same; wanted {least:.0%} at least."
            )


def decode_bytes(cfg: ModelConfig, batch: int, length: int, itemsize: int = 4) -> float:
    """Bytes that a decoding step of `batch` rows of `length` tokens cannot do without, numbers of `itemsize` bytes.

    All weights but the experts that no row chooses (of random choices) and the tables that are read by rows; keys and values.
    """
    total = 0.0
    for part, variable in _variables(cfg):
        share = 1.0
        if cfg.num_experts and ".experts." in part:
            share = 1 - (1 - cfg.top_k_experts / cfg.num_experts) ** batch
        if not part.startswith("per_layer.table"):
            total += share * variable * itemsize
    return total + batch * request_bytes(cfg, length, "float32", CacheFormat.of(cfg)).total * itemsize / 4


def _variables(cfg: ModelConfig) -> list[tuple[str, int]]:
    from gemma4_jax.model.parameters import variables

    return [(name, int(np.prod(variable.get_value().shape))) for name, variable in variables(abstract(cfg)).items()]


def memory_bandwidth(cores: int, megabytes: int = 256) -> float:
    """Bytes per second that all cores together read, best of several passes."""
    parts = [np.ones(megabytes * 10**6 // 4 // cores, np.float32) for _ in range(cores)]
    best = np.inf
    for _ in range(7):
        threads = [threading.Thread(target=part.sum) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


def _row(record: Answer) -> tuple[Any, ...]:
    speeds = (f"{batch / record[f'decode{batch}_s']:.1f} tok/s" for batch in BATCHES)
    seconds = (f"{record[key]:.3f}" for key in ("prefill_s", "first_token_s"))
    return record["model"], record["by"], *seconds, *speeds, f"{record['cache_bytes'] / 1e6:.1f}"


def _ratios(records: list[Answer]) -> list[str]:
    ours, *others = records
    lines = []
    for other in others:
        for key, wanted in (OF_TRANSFORMERS if other["by"] == "transformers" else WANTED).items():
            ratio = other[key] / ours[key]
            lines.append(f"{ours['model']} {key[:-2]}: {ratio:.2f} times as fast as {other['by']} (wanted {wanted})")
        share = ours["cache_bytes"] / other["cache_bytes"]
        lines.append(f"{ours['model']} cache: {share:.2f} times the bytes of {other['by']}")
    for batch in BATCHES:
        reached = ours[f"limit{batch}_s"] / ours[f"decode{batch}_s"]
        lines.append(f"{ours['model']} decode{batch}: {reached:.0%} of what memory allows (wanted 60%)")
    return lines


def main() -> None:
    """Exits with 1 and the reason on stderr if the comparison is not valid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--turns", type=int, choices=range(1, 100), metavar="N", default=5, help="of each side")
    add_peers(parser, PEERS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the checkpoint")
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results")
    options = parser.parse_args()
    peers = given_peers(parser, options.peer, PEERS)
    if options.dtype != "float32" and (others := set(peers) - {"transformers"}):
        parser.error(f"--dtype {options.dtype} is compared with transformers alone; leave out --peer {others.pop()}")
    try:
        compare(
            options.models,
            quick=options.quick,
            turns=options.turns,
            peers=peers,
            dtype=options.dtype,
            save=options.save,
        )
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()

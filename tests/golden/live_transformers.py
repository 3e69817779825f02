"""Runs transformers on an exported checkpoint and writes its logits: the live half of `make parity`.

    python tests/golden/live_transformers.py CHECKPOINT_DIRECTORY INPUTS.npz LOGITS.npz

INPUTS holds `tokens` int [B, T] and, if wanted, `attention_mask` and `position_ids` [B, T] (transformers' conventions:
1 = real; an expected.npz of these fixtures will do). LOGITS gets `logits` float32 [B, T, V], 0 at padding. float32,
eager attention, no cache. Tensors that are missing, unexpected or misshaped are an error that lists them: an export
that transformers would silently complete with random values is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def load_strictly(directory: Path) -> torch.nn.Module:
    """Returns the checkpoint in float32 as the class its config.json names; ValueError unless every name fits."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        raise ValueError(f"{directory}: transformers loads this as {name} only in part: {problems}")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float32 [B, T, V], 0 at padding."""
    tokens = torch.from_numpy(inputs["tokens"].astype(np.int64))
    optional = {
        key: torch.from_numpy(inputs[key].astype(np.int64))
        for key in ("attention_mask", "position_ids")
        if key in inputs
    }
    result = model(input_ids=tokens, use_cache=False, **optional).logits.numpy()
    mask = inputs.get("attention_mask", np.ones_like(inputs["tokens"]))
    return result * (mask == 1)[..., None].astype(np.float32)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors")
    parser.add_argument("inputs", type=Path, help=".npz with tokens [B, T]")
    parser.add_argument("output", type=Path, help=".npz to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = load_strictly(arguments.checkpoint)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    with np.load(arguments.inputs) as stored:
        np.savez_compressed(arguments.output, logits=logits(model, dict(stored)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

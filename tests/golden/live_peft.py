"""Runs transformers and peft on a base and adapters and writes logits: of the base, with the adapters, and after merging.

    python tests/golden/live_peft.py BASE_DIRECTORY ADAPTER_DIRECTORY INPUTS.npz LOGITS.npz

Every tensor of the adapter file must find its place, and every adapter its tensor; else it is an error that lists them.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from live_transformers import load_strictly, logits
from safetensors import safe_open


def main() -> int:
    """Runs the command line; returns the exit status."""
    base, adapter, inputs, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with np.load(inputs) as stored:
        tokens = dict(stored)
    model = load_strictly(base)
    out = {"base": logits(model, tokens)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys it misses
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        stored_names = set(file.keys())
        state = peft.get_peft_model_state_dict(adapted)
        differs = [name for name in stored_names & state.keys() if not torch.equal(state[name], file.get_tensor(name))]
    if stored_names != set(state) or differs:
        print(f"adapters differ: {sorted(stored_names ^ set(state))[:8]} {differs[:8]}", file=sys.stderr)
        return 1
    out["applied"] = logits(adapted, tokens)
    out["merged"] = logits(adapted.merge_and_unload().eval(), tokens)
    np.savez(output, **out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

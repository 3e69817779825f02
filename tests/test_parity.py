"""Live against transformers (`make parity`): it loads what we export and computes the same logits."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.checkpoint.load import load

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parity
@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b"])
def test_transformers_loads_our_export_and_agrees(variant: str, spelling: Literal["new", "old"], tmp_path: Path):
    model = load(GOLDEN / variant, dtype="float32", text_only=True)
    exported = save_hf(model, tmp_path / "hf", dtype="bfloat16", spelling=spelling, max_shard_size="500KB")
    inputs, outputs = GOLDEN / variant / "expected.npz", tmp_path / "logits.npz"
    subprocess.run(
        [sys.executable, str(GOLDEN / "live_transformers.py"), str(exported), str(inputs), str(outputs)], check=True
    )
    with np.load(inputs) as file:
        tokens, mask, positions = file["tokens"], file["attention_mask"] == 1, file["position_ids"]
    with np.load(outputs) as file:
        theirs = file["logits"]
    at = jnp.asarray(np.where(mask, positions, -1), jnp.int32)
    ours = np.asarray(jax.jit(lambda m: m(jnp.asarray(tokens, jnp.int32), at))(model))
    difference = np.abs(ours - theirs)[mask]
    # The tolerances of the golden fixtures: the reference's own attention kernels differ by up to 4e-4.
    assert difference.max() <= 1e-3
    assert difference.mean() <= 5e-5

"""Steps of every variant compiled with the TPU's own compiler, small in width, real in structure and head dims."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: pip install libtpu"
    ),
]
COMMON = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 2048, "sliding_window": 128}
SMALL = {
    "e2b": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 64},
    "e4b": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 64},
    "26b_a4b": {"num_hidden_layers": 6, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 192},
    "31b": {"num_hidden_layers": 6},
}
CASES = [
    ("e2b", "decode", ["mesh.tensor=4"]),
    ("e4b", "prefill", ["mesh.context=4"]),
    ("26b_a4b", "sft", ["mesh.expert=4"]),
    ("31b", "sft", ["mesh.fsdp=2", "mesh.context=2"]),
]


@pytest.mark.parametrize(("variant", "step", "options"), CASES)
def test_a_step_compiles_for_tpus_with_its_kernels(variant, step, options, tmp_path):
    path = tmp_path / "plan.json"
    sizes = COMMON | SMALL[variant]
    arguments = [
        f"--config=configs/plan.py:{variant}",
        f"--config.plan.step={step}",
        "--config.plan.topology=v6e:2x2",
        "--config.plan.batch_size=4",
        "--config.plan.seq_len=1536",
        f"--config.plan.output={path}",
        *(f"--config.model.overrides.{key}={value}" for key, value in sizes.items()),
        *(f"--config.{option}" for option in options),
    ]
    command = [sys.executable, "-m", "launch.run", *arguments]
    done = subprocess.run(command, cwd=PROJECT, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MFU at most" in done.stdout
    found = json.loads(path.read_text())
    assert found["faults"] == []
    kernels = " ".join(found["kernels"])
    assert ("splash" in kernels) == (step != "decode")
    assert ("grouped_matmul" in kernels) == (variant == "26b_a4b")
    assert found["flops"] > found["model_flops"] * 0.5
    assert found["wire_bytes"]

"""Speed and memory on this machine's CPU beside other implementations: `python -m benchmarks`, see README.md."""

import os

# Set before jax or torch load, in every process: the comparison is one of CPUs, and downloads nothing.
os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

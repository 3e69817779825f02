"""Quantisation-aware training of a released Gemma 4, distilled from its own float weights.

VARIANT is e2b, e4b, 26b_a4b or 31b; GRID is q4_0 (llama.cpp's, the default) or int4_sym7_g32 (exact in GGUF, compressed-tensors
and MLX alike). 5,000 steps is what the Gemma 3 report calls typical; 1e-6 to 1e-5 is the range published recipes for distilling
quantised models use. Neither has been tuned on released weights here.

    python -m launch.run --config=configs/qat.py:e2b --config.model.path=HF_DIR --config.data.paths=chats.jsonl
    python -m launch.run --config=configs/qat.py:31b,int4_sym7_g32 --config.model.path=HF_DIR --config.data.paths=chats.jsonl
"""

from launch.settings import defaults


def get_config(variant_and_grid):
    variant, _, grid = variant_and_grid.partition(",")
    config = defaults("qat")
    config.workdir = f"runs/qat_{variant}_{grid or 'q4_0'}"
    config.data.seq_len = 2048
    config.data.batch_size = 32 if variant in ("e2b", "e4b") else 64
    config.optim.learning_rate = 1e-5 if variant in ("e2b", "e4b") else 5e-6
    config.optim.warmup_steps = 100
    config.train.remat = "full"
    config.train.steps = 5000
    config.quant.grid = grid or "q4_0"
    return config

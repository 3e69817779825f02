"""Teaches a tiny E2B the embedded chat tasks: tool calls and their answers, sorting, sums, JSON.

Reads and writes nothing outside the project and `runs/tiny_sft`; takes two to four minutes on two CPU cores. The model keeps every
structural feature of E2B (per-layer embeddings, shared KV, sliding and full layers). The learning rate is the usual one for a
model of this size from random weights, a hundred times that of fine-tuning a released one.

    python -m launch.run --config=configs/tiny_sft.py
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config():
    config = defaults("sft")
    config.workdir = "runs/tiny_sft"
    config.model.variant = "tiny_e2b"
    config.model.dtype = "float32"  # a CPU gains nothing from bfloat16
    config.model.overrides = {"num_hidden_layers": 10, "hidden_size_per_layer_input": 64}
    config.tokenizer = str(assets.TOKENIZER)
    config.data.paths = str(assets.TRAIN)
    config.data.seq_len = 144
    config.data.batch_size = 8
    config.eval_data = {**config.data, "paths": str(assets.HELDOUT), "epochs": 1}
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 40
    config.train.log_every = 40
    config.train.steps = 480
    config.train.eval_every = 240
    config.train.save_every = 240
    return config

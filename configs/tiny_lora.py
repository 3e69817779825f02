"""Adapters beside the model that `tiny_sft` leaves behind: 5 % of its parameters move.

BASE is none (the default), q4_0, w4a16 or int8: what the weights are held as meanwhile.

    python -m launch.run --config=configs/tiny_lora.py
    python -m launch.run --config=configs/tiny_lora.py:w4a16
    python -m launch.run --config=configs/tiny_eval.py --config.model.path=runs/tiny_lora
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config(base=""):
    config = defaults("sft")
    config.workdir = "runs/tiny_lora" + (f"_{base}" if base else "")
    config.model.path = "runs/tiny_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.lora = {"targets": ("attention", "mlp", "per_layer"), "rank": 8, "alpha": 16.0, "base": base or None}
    config.data.paths = str(assets.TRAIN)
    config.data.seq_len = 144
    config.data.batch_size = 8
    config.eval_data = {**config.data, "paths": str(assets.HELDOUT), "epochs": 1}
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 5
    config.train.steps = 100
    config.train.log_every = 20
    return config

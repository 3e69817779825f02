"""Quantisation-aware training from the model `tiny_sft` leaves behind, distilled from its float weights.

POLICY is q4_0 (the default), w4a16, mobile or int8. A tenth of the learning rate and a fifth of the steps of tiny_sft: the
weights only move to where rounding hurts less.

    python -m launch.run --config=configs/tiny_qat.py
    python -m launch.run --config=configs/tiny_qat.py:mobile
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config(policy="q4_0"):
    config = defaults("qat")
    config.workdir = "runs/tiny_qat" if policy == "q4_0" else f"runs/tiny_qat_{policy}"
    config.model.path = "runs/tiny_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.data.paths = str(assets.TRAIN)
    config.data.seq_len = 144
    config.data.batch_size = 8
    config.eval_data = {**config.data, "paths": str(assets.HELDOUT), "epochs": 1}
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 5
    config.train.steps = 100
    config.train.log_every = 20
    config.quant.policy = policy
    config.quant.distill_weight = 0.5
    return config

"""Measures the model of `tiny_sft` on the embedded held-out rows: perplexity, and exact match of greedy answers.

The second command measures what `tiny_qat` left behind, on the same rows.

    python -m launch.run --config=configs/tiny_eval.py
    python -m launch.run --config=configs/tiny_eval.py --config.model.path=runs/tiny_qat
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config():
    config = defaults("eval")
    config.model.path = "runs/tiny_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.data.paths = str(assets.HELDOUT)
    config.data.seq_len = 144
    config.sample.batch_size = 32
    config.data.epochs = 1
    config.sample.max_new_tokens = 64
    config.sample.temperature = 0.0
    return config

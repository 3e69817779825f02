"""Measures the model of `tiny_media_sft` on pictures and sounds it has not met: exact match of greedy answers, by kind of question.

python -m launch.run --config=configs/tiny_media_eval.py
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config():
    config = defaults("eval")
    config.model.path = "runs/tiny_media_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.media.image_tokens = 70
    config.data.paths = "runs/media/heldout.jsonl"
    config.data.seq_len = 256
    config.data.batch_size = 4
    config.data.epochs = 1
    config.sample.batch_size = 8
    config.sample.max_new_tokens = 8
    config.sample.max_length = 256
    config.sample.temperature = 0.0
    return config

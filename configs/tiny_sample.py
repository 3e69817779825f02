"""Asks the model of `tiny_sft` one question, greedily.

The tasks it has learned are those of `tiny_sft`; questions of another kind get nonsense.

    python -m launch.run --config=configs/tiny_sample.py
    python -m launch.run --config=configs/tiny_sample.py --config.prompts.text='Reverse: tree moon ship.'
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config():
    config = defaults("sample")
    config.model.path = "runs/tiny_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.prompts = {"text": "Say the last word: cloud apple moon."}
    config.sample.max_new_tokens = 64
    config.sample.temperature = 0.0
    return config

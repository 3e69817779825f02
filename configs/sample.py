"""Answers prompts with a checkpoint, drawn as the released models' generation_config does: temperature 1, top-k 64, top-p 0.95.

The same seed gives the same answers.

    python -m launch.run --config=configs/sample.py --config.model.path=HF_DIR --config.prompts.text='Why is the sky blue?'
    python -m launch.run --config=configs/sample.py --config.model.path=HF_DIR --config.prompts.chat=conversations.jsonl
"""

from launch.settings import defaults


def get_config():
    config = defaults("sample")
    config.sample.temperature = 1.0
    config.sample.top_k = 64
    config.sample.top_p = 0.95
    config.sample.max_new_tokens = 512
    return config

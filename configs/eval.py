"""Measures a checkpoint on your held-out chats: perplexity of the trained tokens, exact match of greedy answers.

The answers are decoded on this machine, so a large checkpoint needs an accelerator.

    python -m launch.run --config=configs/eval.py --config.model.path=HF_DIR --config.data.paths=heldout.jsonl
"""

from launch.settings import defaults


def get_config():
    config = defaults("eval")
    config.data.seq_len = 4096
    config.data.epochs = 1
    config.sample.temperature = 0.0
    config.sample.max_new_tokens = 512
    return config

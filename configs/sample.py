"""Answers prompts with a checkpoint, drawn as the released models' generation_config does: temperature 1, top-k 64, top-p 0.95.

The same seed gives the same answers.

    python -m launch.run --config=configs/sample.py --config.model.path=HF_DIR --config.prompts.text='Why is the sky blue?'
    python -m launch.run --config=configs/sample.py --config.model.path=HF_DIR --config.prompts.chat=conversations.jsonl

A variant and a slice after a colon set how many answers at a time and how much cache fit it, with the times of docs/slices.md.

    python -m launch.run --config=configs/sample.py:31b,v6e:2x4 --config.model.path=HF_DIR --config.prompts.text='Why so blue?'
"""

from launch.settings import defaults
from launch.slices import set_sizes


def get_config(variant_and_slice=""):
    variant, _, slice_ = variant_and_slice.partition(",")
    config = defaults("sample")
    config.sample.temperature = 1.0
    config.sample.top_k = 64
    config.sample.top_p = 0.95
    config.sample.max_new_tokens = 512
    if variant_and_slice:
        set_sizes(config, "decode", variant, slice_)
    return config

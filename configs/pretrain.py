"""Continued pretraining on plain text from random weights, or from a checkpoint: every token is trained.

Rows are plain text files or JSONL rows of {"text": "..."}, packed to full sequences. VARIANT is e2b, e4b, 26b_a4b, 31b or
a tiny_ twin. The learning rate is the usual one for a run of this length from random weights; take a tenth of it to continue from
a checkpoint. It has not been tuned at full size here.

    python -m launch.run --config=configs/pretrain.py:e2b --config.data.paths=text.jsonl --config.tokenizer=tokenizer.model
    python -m launch.run --config=configs/pretrain.py:e2b --config.data.paths=text.jsonl --config.model.variant=none \\
        --config.model.path=HF_DIR --config.optim.learning_rate=3e-5

A slice after the variant sets batch, length and mesh of a plan that fits it, with the step times of docs/slices.md.

    python -m launch.run --config=configs/pretrain.py:26b_a4b,v5p:4x4x4 --config.data.paths=text.jsonl \\
        --config.tokenizer=tokenizer.model
"""

from launch.settings import defaults
from launch.slices import set_sizes


def get_config(variant):
    variant, _, slice_ = variant.partition(",")
    config = defaults("sft")
    config.workdir = f"runs/pretrain_{variant}"
    config.model.variant = variant
    config.data.kind = "text"
    config.data.seq_len = 2048
    config.data.batch_size = 64
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 200
    config.train.remat = "full"
    config.train.steps = 10_000
    if slice_:
        set_sizes(config, "sft", variant, slice_)
    return config

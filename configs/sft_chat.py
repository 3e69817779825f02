"""Full fine-tuning of a released Gemma 4 on your chats: JSONL rows of {"messages": [...], "tools": [...]}.

VARIANT is e2b, e4b, 26b_a4b or 31b; it chooses the sizes below, the checkpoint says what the model is. The learning rate follows
common practice for full fine-tuning of instruction-tuned models (1e-5 to 2e-5 for the small ones, half of it for the large); it
has not been tuned on released weights here.

    python -m launch.run --config=configs/sft_chat.py:e2b --config.model.path=HF_DIR --config.data.paths=chats.jsonl \\
        --config.workdir=runs/my_sft

A slice after the variant sets batch, length and mesh of a plan that fits it, with the step times of docs/slices.md: e2b,v6e:2x4
e4b,v6e:4x4 26b_a4b,v6e:8x8 31b,v6e:8x8 and others.

    python -m launch.run --config=configs/sft_chat.py:31b,v6e:8x8 --config.model.path=HF_DIR --config.data.paths=chats.jsonl
"""

from gemma4_jax.errors import UserError, did_you_mean
from launch.settings import defaults
from launch.slices import set_sizes

SIZES = {  # variant: (learning rate, rows per step, tokens per row)
    "e2b": (2e-5, 32, 4096),
    "e4b": (2e-5, 32, 4096),
    "26b_a4b": (1e-5, 64, 4096),
    "31b": (1e-5, 64, 4096),
}


def get_config(variant):
    variant, _, slice_ = variant.partition(",")
    if variant not in SIZES:
        raise UserError(f"configs/sft_chat.py has no sizes for {variant!r}; {did_you_mean(variant, SIZES)}")
    config = defaults("sft")
    config.workdir = f"runs/sft_chat_{variant}"
    config.optim.learning_rate, config.data.batch_size, config.data.seq_len = SIZES[variant]
    config.optim.warmup_steps = 50
    config.train.remat = "full"
    config.train.steps = 1000
    if slice_:
        set_sizes(config, "sft", variant, slice_)
    return config

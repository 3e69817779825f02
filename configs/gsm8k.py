"""Real input on a small model: 7,473 grade-school problems with the published 262,144-piece tokenizer.

VARIANT is tiny_e2b or tiny_26b_a4b, widened to the real vocabulary. What it shows is that the whole path (packing, loss over the
full vocabulary, evaluation, saving, resuming) carries real data; models this small learn the form of the answers, not arithmetic.
The files (openai/grade-school-math and the tokenizer) are not part of the project; they stand beside it, in ../shared/data.

    python -m launch.run --config=configs/gsm8k.py:tiny_e2b
    python -m launch.run --config=configs/gsm8k.py:tiny_26b_a4b
"""

from launch.settings import defaults

SHARED = "../shared/data"


def get_config(variant):
    config = defaults("sft")
    config.workdir = f"runs/gsm8k_{variant}"
    config.model.variant = variant
    config.model.dtype = "float32"
    config.model.overrides = {"vocab_size": 262_144}
    config.tokenizer = f"{SHARED}/tokenizer_gemma4.model"
    config.data.paths = f"{SHARED}/gsm8k_train.jsonl"
    config.data.kind = "qa"
    config.data.seq_len = 512
    config.data.batch_size = 4
    config.eval_data = {**config.data, "paths": f"{SHARED}/gsm8k_test.jsonl", "epochs": 1}
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 20
    config.train.steps = 200
    config.train.eval_every = 100
    config.train.save_every = 100
    return config

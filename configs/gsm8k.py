"""Real input on a small model: 7,473 grade-school problems with the published 262,144-piece tokenizer.

VARIANT is tiny_e2b or tiny_26b_a4b, widened to the real vocabulary: 162 M and 37 M parameters, nearly all of them tables. What
it shows is that the whole path (batching, packing, loss over the full vocabulary, evaluation, saving, resuming) carries real
data; models this small learn the form of the answers, not arithmetic. The files are not part of the project: it reads
../shared/data.

    python -m launch.run --config=configs/gsm8k.py:tiny_e2b
    python -m launch.run --config=configs/gsm8k.py:tiny_26b_a4b
"""

from pathlib import Path

from launch.settings import defaults

SHARED = Path("../shared/data")


def get_config(variant):
    config = defaults("sft")
    config.workdir = f"runs/gsm8k/{variant}"
    config.model.variant = variant
    config.model.dtype = "float32"
    config.model.overrides = {"vocab_size": 262_144}
    config.tokenizer = str(SHARED / "tokenizer_gemma4.model")
    config.data.paths = str(SHARED / "gsm8k_train.jsonl")
    config.data.kind = "qa"
    config.data.seq_len = 512
    config.data.batch_size = 4
    config.eval_data = {**config.data, "paths": str(SHARED / "gsm8k_test.jsonl"), "epochs": 1, "shuffle": False}
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 10
    config.train.steps = 80
    config.train.log_every = 10
    config.train.eval_every = 40
    config.train.eval_batches = 8
    config.train.save_every = 40
    return config

"""LoRA of a released Gemma 4 on your chats: small matrices are trained beside the weights, and the weights stay.

VARIANT is e2b, e4b, 26b_a4b or 31b. BASE holds the weights as codes meanwhile (QLoRA): q4_0 or w4a16 (4.5 bits a weight), int8;
without it, or with none, they are bfloat16. The learning rate is ten times that of full fine-tuning, as is usual for adapters, and
rank and alpha are the usual ones; none of it has been tuned on released weights here. Experts get adapters only when they are named
(--config.lora.targets=attention,mlp,experts): each of the 128 has its own, which is many and slow.

    python -m launch.run --config=configs/lora.py:e2b --config.model.path=HF_DIR --config.data.paths=chats.jsonl
    python -m launch.run --config=configs/lora.py:31b,w4a16 --config.model.path=HF_DIR --config.data.paths=chats.jsonl

A slice after the base sets batch, length and mesh of a plan that fits it, with the memory and step times of docs/slices.md:
e2b,none,v5e:2x2 e2b,w4a16,v5e:2x2 e4b,none,v6e:2x2 e4b,w4a16,v5e:2x2 26b_a4b,none,v6e:2x4 26b_a4b,w4a16,v6e:2x2
31b,none,v6e:2x4 31b,w4a16,v6e:2x2.

    python -m launch.run --config=configs/lora.py:31b,w4a16,v6e:2x2 --config.model.path=HF_DIR --config.data.paths=chats.jsonl

The run's directory then stands for the merged model wherever a checkpoint is read; adapters alone are an export:

    python -m launch.run --config=configs/sample.py --config.model.path=runs/lora_e2b --config.prompts.text='...'
    python -m launch.run --config=configs/export.py:hf --config.export.source=runs/lora_e2b --config.export.path=merged
    python -m launch.run --config=configs/export.py:peft --config.export.source=runs/lora_e2b --config.export.path=adapters
"""

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.quant.policies import POLICIES
from launch.settings import defaults
from launch.slices import set_sizes

SIZES = {  # variant: (learning rate, rows per step, tokens per row)
    "e2b": (2e-4, 16, 4096),
    "e4b": (2e-4, 16, 4096),
    "26b_a4b": (1e-4, 32, 4096),
    "31b": (1e-4, 32, 4096),
}


def get_config(variant_and_base):
    variant, base, slice_, *more = [*variant_and_base.split(","), "", ""]
    base = "" if base == "none" else base
    if any(more):
        raise UserError(f"configs/lora.py takes VARIANT,BASE,SLICE; got {variant_and_base!r}.")
    for what, given, known in (("variant", variant, SIZES), ("base", base or "q4_0", POLICIES)):
        if given not in known:
            raise UserError(f"configs/lora.py:VARIANT,BASE has the {what} {given!r}; {did_you_mean(given, known)}")
    config = defaults("sft")
    config.workdir = f"runs/lora_{variant}" + (f"_{base}" if base else "")
    config.model.param_dtype = "bfloat16"  # of the base; adapters are float32
    config.lora = {"targets": ("attention", "mlp"), "rank": 16, "alpha": 32.0, "base": base or None}
    config.optim.learning_rate, config.data.batch_size, config.data.seq_len = SIZES[variant]
    config.optim.warmup_steps = 20
    config.train.remat = "full"
    config.train.steps = 1000
    if slice_:
        set_sizes(config, "lora", variant, slice_, base or None)
    return config

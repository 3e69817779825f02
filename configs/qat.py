"""Quantisation-aware training of a released Gemma 4, distilled from its own float weights.

VARIANT is e2b, e4b, 26b_a4b or 31b; POLICY says what is to be shipped (the table is in gemma4_jax/quant/policies.py):

    q4_0    GGUF Q4_0 and a bfloat16 checkpoint with the same numbers (the default): 4.5 bits a weight, embeddings included;
            rounding error of a weight 8.6 % before training
    w4a16   compressed-tensors for vLLM: 4.5 bits in linear layers, tables in bfloat16; 9.5 %
    mobile  E2B and E4B alone: 4 and 2 bits, int8 activations and cache; 11 % and 39 %. Without training such a model is of
            no use: expect to need more steps than for the others, and a higher learning rate
    int8    compressed-tensors: 8 bits in linear layers; 0.8 %. Rounding without training costs next to nothing here

5,000 steps is what the Gemma 3 report calls typical; its QAT took back 54 % of the perplexity that Q4_0 costs. 1e-6 to 1e-5 is
the range of learning rates in published recipes for distilling quantised models. None of this has been tuned on released
weights here.

    python -m launch.run --config=configs/qat.py:e2b --config.model.path=HF_DIR --config.data.paths=chats.jsonl
    python -m launch.run --config=configs/qat.py:e2b,mobile --config.model.path=HF_DIR --config.data.paths=chats.jsonl
    python -m launch.run --config=configs/qat.py:31b,w4a16 --config.model.path=HF_DIR --config.data.paths=chats.jsonl

A slice after the policy sets batch, length and mesh of a plan that fits it, teacher included, with the step times of
docs/slices.md: e2b,q4_0,v6e:2x4 e4b,mobile,v6e:4x4 26b_a4b,q4_0,v6e:8x8 31b,w4a16,v6e:8x8.

    python -m launch.run --config=configs/qat.py:31b,w4a16,v6e:8x8 --config.model.path=HF_DIR --config.data.paths=chats.jsonl
"""

from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.quant.policies import POLICIES
from launch.settings import defaults
from launch.slices import set_sizes

VARIANTS = ("e2b", "e4b", "26b_a4b", "31b")


def get_config(variant_and_policy):
    variant, policy, slice_, *more = [*variant_and_policy.split(","), "", ""]
    policy = policy or "q4_0"
    if any(more):
        raise UserError(f"configs/qat.py takes VARIANT,POLICY,SLICE; got {variant_and_policy!r}.")
    for what, given, known in (("variant", variant, VARIANTS), ("policy", policy, POLICIES)):
        if given not in known:
            raise UserError(f"configs/qat.py:VARIANT,POLICY has the {what} {given!r}; {did_you_mean(given, known)}")
    config = defaults("qat")
    small = variant in ("e2b", "e4b")
    config.workdir = f"runs/qat_{variant}_{policy}"
    config.data.seq_len = 2048
    config.data.batch_size = 32 if small else 64
    config.optim.learning_rate = 1e-5 if small else 5e-6
    config.optim.warmup_steps = 100
    config.train.remat = "full"
    config.train.steps = 5000
    config.quant.policy = policy
    if slice_:
        set_sizes(config, "qat", variant, slice_)
    return config

"""Does it fit? Compiles a training (SFT, QAT, LoRA), prefill or decode step for a TPU slice or a GPU box that is not here.

VARIANT is e2b, e4b, 26b_a4b or 31b. Needs the compiler (`pip install 'gemma4_jax[tpu]'`), no TPU. A full-size step compiles in
two to ten minutes on two CPU cores; `--config.plan.mode=estimate` answers in seconds.

    python -m launch.run --config=configs/plan.py:31b --config.plan.topology=v6e:8x8 --config.plan.batch_size=64
    python -m launch.run --config=configs/plan.py:e4b --config.plan.step=decode --config.plan.topology=v5e:2x4
    python -m launch.run --config=configs/plan.py:31b --config.plan.step=lora --config.lora.base=w4a16 \\
        --config.model.param_dtype=bfloat16 --config.plan.topology=v6e:2x2 --config.plan.batch_size=4
"""

from launch.settings import defaults


def get_config(variant):
    config = defaults("plan")
    config.model.variant = variant
    return config

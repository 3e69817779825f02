"""Rewrites a checkpoint: Hugging Face safetensors to Orbax, or back. Float models pass through tensor by tensor;
memory holds one of them, or some rows of a table. Models on a grid are held whole.

bfloat16 to bfloat16 is bit-identical in both directions.

    python -m launch.run --config=configs/convert.py:orbax --config.convert.source=HF_DIR --config.convert.target=OUR_DIR
    python -m launch.run --config=configs/convert.py:hf --config.convert.source=OUR_DIR --config.convert.target=HF_DIR
"""

from launch.settings import defaults


def get_config(format="hf"):
    config = defaults("convert")
    config.convert.format = format
    return config

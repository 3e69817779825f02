"""Writes a checkpoint for other programs. FORMAT is one of

    hf                  transformers: bfloat16 weights, exactly on the lattice they were trained on
    gguf                llama.cpp: Q4_0 or Q8_0 where the weights were trained so, else bfloat16
    compressed-tensors  vLLM, transformers: W4A16 (int4_sym7_g32), W8A16 (int8_channel)
    mobile              E2B and E4B: 2, 4 and 8 bits per channel, int8 activations

The codes are those that training rounded to; nothing is quantised a second time. A float checkpoint is written as floats, unless
export.policy rounds it now: post-training quantisation, worse than training (configs/qat.py). Beside the file stands a manifest:
grids, error of every tensor, digest of the source. Memory holds a block of rows, not the model. The model in the source is read
with its grids, and what is written is what its forward pass computes with, or the export fails and says how many blocks differ.

    python -m launch.run --config=configs/export.py:gguf --config.export.source=runs/qat --config.export.path=model.gguf
    python -m launch.run --config=configs/export.py:hf --config.export.source=runs/qat --config.export.path=model_bf16
    python -m launch.run --config=configs/export.py:gguf --config.export.source=HF_DIR --config.export.path=model.gguf \
        --config.export.policy=q4_0
"""

from launch.settings import defaults


def get_config(format):
    config = defaults("export")
    config.export.format = format
    return config

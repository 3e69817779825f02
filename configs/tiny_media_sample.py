"""Asks the model of `tiny_media_sft` about a picture or a sound of yours, greedily.

It has learned what the three questions of `gemma4_jax.assets.make_media` ask, of drawn shapes and of tones; everything else it
sees or hears gets one of those ten words.

    python -m launch.run --config=configs/tiny_media_sample.py \\
        --config.prompts.images=runs/media/pictures/heldout_00000.png --config.prompts.text='Which colour is it?'
    python -m launch.run --config=configs/tiny_media_sample.py \\
        --config.prompts.audio=runs/media/sounds/heldout_00000.wav --config.prompts.text='Is the tone low, middle or high?'
"""

from gemma4_jax import assets
from launch.settings import defaults


def get_config():
    config = defaults("sample")
    config.model.path = "runs/tiny_media_sft"
    config.model.dtype = "float32"
    config.tokenizer = str(assets.TOKENIZER)
    config.media.image_tokens = 70
    config.sample.max_length = 512
    config.sample.max_new_tokens = 8
    config.sample.temperature = 0.0
    return config

"""Sounds to soft tokens against transformers' numbers: log-mel frames, features of single sounds and of a padded batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from media_golden import golden, recipes

from gemma4_jax.media.batch import batch_media
from gemma4_jax.media.sounds import log_mel, sound_piece
from gemma4_jax.model.multimodal import soft_frames


@pytest.mark.parametrize("index", range(len(recipes.SOUNDS)))
def test_log_mel(index):
    g, sound = golden("media_e2b"), recipes.SOUNDS[index]
    mel = sound_piece(sound.waveform()).mel
    assert mel.dtype == np.float32
    assert len(mel) == g.numbers[f"mel_count/{index}"]
    kept = mel[:: max(1, len(mel) // 24)]
    assert np.abs(kept - g.numbers[f"mel/{index}"]).max() <= g.tolerance("mel_max")


def test_frames_of_every_length():
    """One soft token for each 40 ms begun, as two rounding halvings of the frames give it; 750 at 30 s."""
    for samples in (161, 320, 321, 640, 4800, 16_000, 59_200, 480_000):
        frames = (samples - 161) // 160 + 1
        assert log_mel(np.zeros(samples, np.float32)).shape == (frames, 128)
        assert soft_frames(frames) == math.ceil(math.ceil(frames / 2) / 2)
    assert soft_frames(99) == 25
    assert soft_frames(2999) == 750
    np.testing.assert_allclose(log_mel(np.zeros(500, np.float32)), np.log(0.001), atol=1e-6)


@pytest.mark.parametrize("together", [False, True])
def test_features_alone_and_in_a_padded_batch(together):
    g = golden("media_e2b")
    pieces = [sound_piece(sound.waveform()) for sound in recipes.SOUNDS[: 3 if together else 5]]
    groups = [pieces] if together else [[piece] for piece in pieces]
    run = quick.jit(lambda model, media: model.soft_tokens(media).values)
    found = []
    for group in groups:
        media = jax.tree.map(jnp.asarray, batch_media([[piece] for piece in group], 750, g.model.cfg.vision))
        values = np.asarray(run(g.model, media))
        found += [values[np.asarray(media.soft_index)[i, : piece.count]] for i, piece in enumerate(group)]
    for i, ours in enumerate(found):
        assert len(ours) == g.numbers[f"sound_count/{i}"]
        expected = g.numbers[f"sound_batch/{i}" if together else f"sound/{i}"]
        assert expected.std() > 0.5
        kept = ours[:: max(1, len(ours) // 24)]
        assert np.abs(kept - expected).max() <= g.tolerance("features_max"), recipes.SOUNDS[i]

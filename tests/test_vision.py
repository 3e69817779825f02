"""Pictures to soft tokens against transformers' numbers: pixels exactly, features of every budget and odd shapes."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from media_golden import GOLDEN, golden, recipes

from gemma4_jax.config_media import VisionConfig
from gemma4_jax.media.batch import batch_media
from gemma4_jax.media.images import patch_positions, patches_of
from gemma4_jax.model.multimodal import Media

PREPROCESSING = json.loads((GOLDEN / "preprocessing.json").read_text())["pictures"]


@pytest.mark.parametrize("index", range(len(recipes.RESIZED)))
def test_pixels_are_those_of_the_reference(index):
    picture, expected = recipes.RESIZED[index], PREPROCESSING[index]
    vision = VisionConfig()
    piece = patches_of(picture.pixels(), vision, picture.budget)
    positions = patch_positions(piece.count, piece.columns, 3).reshape(-1, 2)
    rows, columns = expected["grid"]
    assert piece.count == expected["soft_tokens"]
    assert (positions[:, 1].max() + 1, positions[:, 0].max() + 1) == (rows, columns)
    # The reference lists patches row by row over the whole picture, and scales before it rounds to float32.
    order = np.lexsort((positions[:, 0], positions[:, 1]))
    assert (positions[order] == np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)).all()
    pixels = (piece.cells.reshape(-1, vision.patch_values)[order].astype(np.float64) * (1 / 255)).astype(np.float32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("fixture", ["media_e2b", "media_31b"])
def test_features_of_every_budget_and_shape(fixture):
    g = golden(fixture)
    vision = g.model.cfg.vision
    assert vision is not None
    pieces = [patches_of(picture.pixels(), vision, picture.budget) for picture in recipes.TOWER]
    media = jax.tree.map(jnp.asarray, batch_media([[piece] for piece in pieces], 1120, vision))
    soft = quick.jit(lambda model, media: model.soft_tokens(media))(g.model, media)
    for i, piece in enumerate(pieces):
        assert piece.count == g.numbers[f"picture_count/{i}"]
        ours = np.asarray(soft.values)[np.asarray(media.soft_index)[i, : piece.count]]
        expected = g.numbers[f"picture/{i}"]
        kept = ours[:: max(1, piece.count // 24)]
        assert expected.std() > 0.5
        assert np.abs(kept - expected).max() <= g.tolerance("features_max"), recipes.TOWER[i]


def test_padding_and_company_change_nothing():
    """A picture alone, beside others and in a larger budget's group gives the same soft tokens."""
    g = golden("media_31b")
    vision = g.model.cfg.vision
    assert vision is not None
    small = patches_of(recipes.SMALL.pixels(), vision, 70)
    wide = patches_of(recipes.WIDE.pixels(), vision, 70)

    def soft(*pieces) -> np.ndarray:
        media = jax.tree.map(jnp.asarray, batch_media([[piece] for piece in pieces], 70, vision))
        values = quick.jit(lambda model, media: model.soft_tokens(media).values)(g.model, media)
        return np.asarray(values)[np.asarray(media.soft_index)[0, : pieces[0].count]]

    alone = soft(small)
    np.testing.assert_allclose(soft(small, wide, wide), alone, atol=1e-5)
    other = small.__class__(small.cells, small.columns, 140)
    media = jax.tree.map(jnp.asarray, batch_media([[other]], 70, vision))
    values = quick.jit(lambda model, media: model.soft_tokens(media).values)(g.model, media)
    np.testing.assert_allclose(np.asarray(values)[: small.count], alone, atol=1e-5)


def test_remat_gives_the_same_gradients():
    g = golden("media_31b")
    vision = g.model.cfg.vision
    assert vision is not None
    piece = patches_of(recipes.SMALL.pixels(), vision, 70)
    media: Media = jax.tree.map(jnp.asarray, batch_media([[piece]], 70, vision))

    def gradients(remat: str):
        def loss(model):
            return jnp.sum(jnp.sin(model.soft_tokens(media, remat=remat).values[: piece.count]))

        return jax.tree.leaves(quick.jit(jax.grad(loss))(g.model).vision)

    for a, b in zip(gradients("none"), gradients("full"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)

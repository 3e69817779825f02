"""Whole models with pictures, frames and sounds against transformers: logits, loss, gradients into the towers, greedy tokens.

Fixtures and tolerances with their reasons: tests/golden/README.md and expected.json.
"""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from media_golden import golden, pieces_of, recipes

from gemma4_jax.checkpoint.names import MULTIMODAL_PREFIX, in_file, table
from gemma4_jax.media.batch import batch_media
from gemma4_jax.media.pieces import shifted, uncut
from gemma4_jax.model.decode import fill_block, unroll
from gemma4_jax.model.kv import Chunk, begin_rows, empty_cache, extend_rows
from gemma4_jax.model.layouts import CacheFormat
from gemma4_jax.model.multimodal import Media, SoftTokens
from gemma4_jax.model.parameters import arrays, is_trainable, variables
from gemma4_jax.model.transformer import Transformer

CASES = [(fixture, case) for fixture, cases in recipes.USED.items() for case in cases]
STRIDE = 3


class Result(NamedTuple):
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]  # under the names of the file, in its layout


def batch_of(fixture: str, case: str) -> dict[str, np.ndarray]:
    n = golden(fixture).numbers
    mask, labels = n[f"{case}/attention_mask"] == 1, n[f"{case}/labels"]
    positions = np.where(mask, np.arange(mask.shape[1]), -1)
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    return {"tokens": n[f"{case}/input_ids"], "positions": positions.astype(np.int32), "targets": targets}


def media_of(fixture: str, case: str) -> Media:
    g = golden(fixture)
    length = g.numbers[f"{case}/input_ids"].shape[1]
    return jax.tree.map(jnp.asarray, batch_media(pieces_of(fixture, case), length, g.model.cfg.vision))


@functools.cache
def result(fixture: str, case: str) -> Result:
    g, batch, media = golden(fixture), batch_of(fixture, case), media_of(fixture, case)
    trained = jnp.asarray(batch["targets"] != -100)
    targets = jnp.asarray(np.maximum(batch["targets"], 0), jnp.int32)

    def forward(model: Transformer):
        logits = model(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), media=media, remat="full")
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=2)[..., 0]
        return -jnp.sum(jnp.where(trained, log_p, 0.0)) / jnp.sum(trained, dtype=jnp.float32), logits

    (loss, logits), gradients = quick.jit(jax.value_and_grad(forward, has_aux=True))(g.model)
    learns = {name for name, variable in variables(g.model).items() if is_trainable(variable)}
    ours = {name: np.ascontiguousarray(value) for name, value in arrays(gradients).items()}
    found = {
        in_file(name, MULTIMODAL_PREFIX): entry.view(ours[entry.parameter][(*entry.index, ...)])
        for name, entry in table(g.model.cfg).items()
        if entry.parameter in learns
    }
    return Result(np.asarray(logits), float(loss), found)


@pytest.mark.parametrize(("fixture", "case"), CASES)
def test_logits_and_loss(fixture, case):
    g, got = golden(fixture), result(fixture, case)
    facts = g.facts["cases"][case]
    real = (batch_of(fixture, case)["positions"] >= 0)[:, ::STRIDE]
    difference = np.abs(got.logits[:, ::STRIDE] - g.numbers[f"{case}/logits"])[real]
    assert facts["logits_std"] > 2
    assert difference.max() <= g.tolerance("logits_max")
    assert difference.mean() <= g.tolerance("logits_mean")
    assert got.loss == pytest.approx(facts["loss"], rel=g.tolerance("loss_relative"))


@pytest.mark.parametrize(("fixture", "case"), CASES)
def test_gradients_into_the_towers(fixture, case):
    g, got = golden(fixture), result(fixture, case)
    norms, compared = g.facts["cases"][case]["gradient_norms"], 0
    for name, gradient in got.gradients.items():
        # torch gives row 0 of a lookup table no gradient (padding_idx), and a tower that was not used none at all.
        ours = gradient[1:] if name.split(".")[-2].startswith("embed_tokens") else gradient
        assert np.linalg.norm(ours) == pytest.approx(norms.get(name, 0.0), rel=g.tolerance("gradient_norm_relative")), (
            name
        )
    assert norms.keys() <= got.gradients.keys()
    for key, expected in g.numbers.items():
        name = key.removeprefix(f"{case}/gradient/")
        if name != key:
            compared += 1
            error = np.linalg.norm(got.gradients[name] - expected) / np.linalg.norm(expected)
            assert error <= g.tolerance("gradient_relative"), name
    assert compared >= 4


def test_pictures_see_themselves_whole_and_only_where_they_should():
    """The 31b fixture's logits move when the picture's tokens become causal, the e2b fixture's do not know the difference."""
    batch, media = batch_of("media_31b", "images"), media_of("media_31b", "images")
    model = golden("media_31b").model
    causal = Media(media.soft_index, jnp.zeros_like(media.block_ids), media.images, media.sounds)
    run = quick.jit(lambda m, media: m(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), media=media))
    assert np.abs(np.asarray(run(model, causal)) - result("media_31b", "images").logits).max() > 0.5
    assert max(piece.count for row in pieces_of("media_31b", "images") for piece in row) > model.cfg.sliding_window


def packed(fixture: str, case: str) -> tuple[np.ndarray, ...]:
    """The rows of a case one after the other in one row: tokens, positions, segments, pieces, and where each row lies."""
    batch, pieces = batch_of(fixture, case), pieces_of(fixture, case)
    lengths = [int((row >= 0).sum()) for row in batch["positions"]]
    starts = np.cumsum([0, *lengths])
    tokens = np.concatenate([row[:n] for row, n in zip(batch["tokens"], lengths, strict=True)])[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])[None].astype(np.int32)
    moved = [piece for row, by in zip(pieces, starts, strict=False) for piece in shifted(tuple(row), int(by))]
    return tokens, positions, segments, moved, starts


@pytest.mark.parametrize(("fixture", "case"), [("media_e2b", "sounds"), ("media_31b", "images")])
def test_packed_rows_equal_rows_of_their_own(fixture, case):
    g = golden(fixture)
    tokens, positions, segments, pieces, starts = packed(fixture, case)
    media = jax.tree.map(jnp.asarray, batch_media([pieces], tokens.shape[1], g.model.cfg.vision))
    run = quick.jit(lambda m, media: m(*(jnp.asarray(x) for x in (tokens, positions, segments)), media=media))
    logits = np.asarray(run(g.model, media))[0]
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        ours = logits[start:stop:STRIDE]
        difference = np.abs(ours - g.numbers[f"{case}/logits"][row, : len(ours)])
        assert difference.max() <= g.tolerance("logits_max")
        assert difference.mean() <= g.tolerance("logits_mean")


@pytest.mark.parametrize(("fixture", "case"), CASES)
def test_greedy_tokens_through_the_cache(fixture, case):
    """Prefill of the whole prompt with media, then step by step."""
    g, batch = golden(fixture), batch_of(fixture, case)
    expected = g.numbers[f"{case}/greedy_tokens"]
    length = batch["tokens"].shape[1] + expected.shape[1]
    prefill = quick.jit(
        lambda m, media: m.prefill(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), length, media=media)
    )
    hidden, cache = prefill(g.model, media_of(fixture, case))
    decoder = unroll(g.model)
    last = batch["positions"].max(axis=1)
    logits = quick.jit(g.model.logits)(hidden[np.arange(len(last)), last])

    @quick.jit
    def step(decoder, token, position, cache):
        hidden, cache = decoder.step(token[:, None], position[:, None], cache)
        return decoder.logits(hidden[:, 0]), cache

    found = []
    for i in range(expected.shape[1]):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        found.append(np.asarray(token))
        logits, cache = step(decoder, token, jnp.asarray(last + 1 + i), cache)
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)


def test_soft_tokens_can_be_made_first_and_passed_on():
    g, batch, media = golden("media_31b"), batch_of("media_31b", "images"), media_of("media_31b", "images")
    soft = quick.jit(lambda m, media: m.soft_tokens(media))(g.model, media)
    assert isinstance(soft, SoftTokens)
    run = quick.jit(lambda m, soft: m(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), media=soft))
    logits = np.asarray(run(g.model, soft))
    real = batch["positions"] >= 0
    np.testing.assert_allclose(logits[real], result("media_31b", "images").logits[real], atol=1e-3)


def test_a_prompt_is_never_cut_inside_a_picture():
    pieces = tuple(pieces_of("media_31b", "images")[0])
    first, second = pieces
    assert uncut(pieces, first.start) == first.start
    assert uncut(pieces, first.start + 1) == uncut(pieces, first.start + first.count - 1) == first.start
    assert uncut(pieces, first.start + first.count) == first.start + first.count
    assert uncut(pieces, second.start + 5) == second.start


def test_towers_that_are_not_there():
    text = golden("media_31b").model
    media = media_of("media_e2b", "sounds")
    with pytest.raises(Exception, match="no audio tower, so it takes no sounds"):
        text.soft_tokens(media)


@pytest.mark.parametrize(("fixture", "cuts"), [("media_31b", (12, 31)), ("media_e2b", (9, 40))])
def test_a_prompt_read_in_chunks_equals_one_read_at_once(fixture, cuts):
    """Chunks end before a picture they would split; each sees what the ring still holds and the picture whole."""
    g, batch = golden(fixture), batch_of(fixture, "images")
    pieces, length = tuple(pieces_of(fixture, "images")[0]), int((batch["positions"][0] >= 0).sum())
    inside = [uncut(pieces, pieces[1].start + by) for by in cuts]  # both fall back to the start of the second picture
    assert set(inside) == {pieces[1].start}
    edges = [0, uncut(pieces, pieces[0].start + 1), inside[0], uncut(pieces, length - 3), length]
    cfg, decoder = g.model.cfg, unroll(g.model)
    whole = jax.tree.map(jnp.asarray, batch_media([pieces], length, cfg.vision))
    soft = quick.jit(lambda m, media: m.soft_tokens(media))(g.model, whole)
    cache, cache_format = empty_cache(cfg, 1, 256, "float32"), CacheFormat()
    stored, positions, own = list(cache.layers), cache.positions, len(cache.layers)
    hidden = []
    for start, stop in itertools.pairwise(edges):
        here = SoftTokens(
            soft.values, soft.soft_index[:, start:stop], soft.block_ids[:, start:stop], soft.longest_image
        )
        tokens = jnp.asarray(batch["tokens"][:1, start:stop])
        numbers = (np.array([x], np.int32) for x in (0, start, stop - start))
        chunk = Chunk(tokens, *numbers, np.array([start == 0]))
        before = begin_rows(positions, chunk)

        @quick.jit
        def run(decoder, stored, tokens, before, chunk, here):
            h, per_layer = decoder.embed_tokens(tokens, decoder.per_layer, here)
            return fill_block(decoder.layers[:own], stored, h, per_layer, before, chunk, cfg, cache_format, here)

        h, stored = run(decoder, tuple(stored), tokens, before, chunk, here)
        after = extend_rows(before, chunk)
        positions = {kind: positions[kind].at[chunk.rows].set(after[kind]) for kind in positions}
        hidden.append(np.asarray(h)[0])
    found = np.concatenate(hidden)
    if cfg.num_kv_shared_layers:  # the layers that share keys come later: compare what goes into them
        wanted = wanted_before_sharing(fixture, batch, length)
    else:
        wanted, found = (
            result(fixture, "images").logits[0, :length],
            np.asarray(g.model.logits(g.model.final_norm(found))),
        )
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def wanted_before_sharing(fixture: str, batch: dict[str, np.ndarray], length: int) -> np.ndarray:
    """The residual stream after the layers that own keys and values, of row 0 at once."""
    model = golden(fixture).model

    @quick.jit
    def run(model, media):
        positions = jnp.asarray(batch["positions"])
        soft = model.soft_tokens(media)
        h, per_layer = model.embed_tokens(jnp.asarray(batch["tokens"]), model.per_layer, soft)
        first = per_layer[: model.own.plan.layers]
        return model.own(h, first, model.places(positions, None, soft), None, remat="none")[0]

    return np.asarray(run(model, media_of(fixture, "images")))[0, :length]

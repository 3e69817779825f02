"""The FLOPs counted of pictures and sounds against the products of the traced towers; padding, and what is trained."""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import ModelConfig
from gemma4_jax.media.batch import MediaShape, batch_media
from gemma4_jax.media.pieces import ImagePiece, SoundPiece
from gemma4_jax.model.parameters import variables
from gemma4_jax.model.transformer import abstract
from gemma4_jax.train.metrics import Meter
from gemma4_jax.train.tower_flops import media_flops, picture_flops, sound_flops

CFG = ModelConfig.variant("tiny_e2b", multimodal=True)
NAMES = [*variables(abstract(CFG))]


def of(*modules: str) -> list[str]:
    return [name for name in NAMES if name.partition(".")[0] in modules]


def media_of(cells: tuple[int, ...], frames: tuple[int, ...], room: MediaShape | None = None):
    """Pictures of so many soft tokens and sounds of so many frames, in one row."""
    shape = CFG.vision.cell_patches, CFG.vision.patch_values
    pieces = [ImagePiece(np.zeros((count, *shape), np.uint8), 1, 70) for count in cells]
    pieces += [SoundPiece(np.zeros((count, 128), np.float32)) for count in frames]
    return batch_media([[piece.at(0) for piece in pieces]], 900, CFG.vision, shape=room)


def products(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a traced function."""
    total = 0.0
    for equation in jaxpr.eqns:
        out, params = equation.outvars[0].aval.shape, equation.params
        if equation.primitive.name == "dot_general":
            contracted = [equation.invars[0].aval.shape[dim] for dim in params["dimension_numbers"][0][0]]
            total += 2.0 * math.prod(out) * math.prod(contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2.0 * math.prod(out) * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
        inner = [p for value in params.values() for p in (value if isinstance(value, tuple | list) else [value])]
        inner = [getattr(p, "jaxpr", p) for p in inner]
        times = params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(p) for p in inner if hasattr(p, "eqns"))
    return total


def traced(fn, *arguments) -> float:
    return products(jax.make_jaxpr(fn)(*arguments).jaxpr)


def test_pictures_cost_the_products_of_the_tower():
    model, media = abstract(CFG), media_of((70, 70, 70), ())
    tower, soft_tokens = picture_flops(CFG.vision, media.images[0])
    assert soft_tokens == 210
    assert tower == pytest.approx(traced(lambda v, x: v(x, "float32"), model.vision, media.images[0]), rel=1e-6)
    projected = traced(lambda m, x: m.soft_tokens(x).values, model, media)
    assert media_flops(CFG, media) == pytest.approx(projected, rel=1e-6)


def test_sounds_cost_the_products_of_the_tower():
    """The program makes two chunks of scores for each chunk of queries; of these a token's own window counts."""
    model, media = abstract(CFG), media_of((), (400, 400))
    cfg, tokens = CFG.audio, 100
    width, window, layers = cfg.hidden_size, cfg.attention_chunk_size, cfg.num_hidden_layers
    tower, soft_tokens = sound_flops(cfg, media.sounds)
    assert soft_tokens == 2 * tokens
    seen = sum(min(token + 1, window) for token in range(tokens))
    counted = 2 * layers * seen * 6 * width
    slots = -(-tokens // window) * window
    made = 2 * layers * slots * 2 * width * (2 * window + 2 * window + window + 1)
    program = traced(lambda a, x: a(x, "float32"), model.audio, media.sounds)
    assert tower - counted == pytest.approx(program - made, rel=1e-6)
    assert counted < made


def test_padding_and_missing_media_cost_nothing():
    room = MediaShape(((70, 8), (140, 2)), 4, 600)
    real, padded = media_of((12, 35), (130,)), media_of((12, 35), (130,), room)
    assert media_flops(CFG, padded) == pytest.approx(float(media_flops(CFG, real)), rel=1e-6)
    assert media_flops(CFG, media_of((), (), room)) == 0
    one, both = (sum(float(media_flops(CFG, media_of((n,), ()))) for n in sizes) for sizes in ((12,), (12, 35)))
    assert media_flops(CFG, media_of((12, 35), ())) == pytest.approx(both, rel=1e-6)
    assert one < both


def test_what_moves_costs_its_gradients():
    """A trained tower three passes, and its projector's inputs one; a trained projector one more; the decoder nothing."""
    media = media_of((12, 35), (130,))
    seen, heard = (dataclasses.replace(CFG, **{other: None}) for other in ("audio", "vision"))
    looking, listening = (float(media_flops(cfg, media)) for cfg in (seen, heard))
    tower, soft_tokens = map(float, picture_flops(CFG.vision, media.images[0]))
    projector = 2 * soft_tokens * CFG.vision.hidden_size * CFG.hidden_size
    forward = float(media_flops(CFG, media))
    assert looking == pytest.approx(tower + projector)
    assert forward == pytest.approx(looking + listening)
    assert media_flops(CFG, media, of("own", "shared", "embed")) == forward
    assert media_flops(CFG, media, of("vision", "vision_projection")) == pytest.approx(3 * looking + listening)
    assert media_flops(CFG, media, of("vision")) == pytest.approx(forward + 2 * tower + projector)
    assert media_flops(CFG, media, of("vision_projection")) == pytest.approx(forward + projector)
    assert media_flops(CFG, media, NAMES) == pytest.approx(3 * forward)


def test_released_towers():
    """A picture of 280 soft tokens by the sizes of the matrices: 2 FLOPs a weight and patch, and attention."""
    for name, billions in (("e2b", 0.87), ("31b", 2.9)):
        cfg = ModelConfig.variant(name, multimodal=True)
        sizes = {key: math.prod(v.shape) for key, v in variables(abstract(cfg)).items() if key.endswith(".w")}
        weights = sum(size for key, size in sizes.items() if key.startswith("vision.layers"))
        patches = 280 * cfg.vision.cell_patches
        positions = np.zeros((1, 280, cfg.vision.cell_patches, 2), np.int32)
        group = dataclasses.replace(media_of((1,), ()).images[0], positions=jnp.asarray(positions))
        found = float(picture_flops(cfg.vision, group)[0])
        attention = 4 * cfg.vision.num_hidden_layers * cfg.vision.num_attention_heads * cfg.vision.head_dim * patches**2
        assert found == pytest.approx(2 * patches * (weights + sizes["vision.patch.w"]) + attention, rel=1e-6)
        assert billions * 1e12 < found < 1.25 * billions * 1e12


def test_the_log_counts_what_a_step_says():
    row = {"loss": 2.0, "ce": 2.0, "kl": 0.0, "accuracy": 0.5, "tokens": 10.0, "slots": 20.0, "skipped": 0.0}
    row |= {"grad_norm": 1.0, "learning_rate": 1e-3}
    meter = Meter(10, flops_per_token=1e6, peak_flops=1e12)
    for towers in ({"tower_flops": 5e7}, {}, {"tower_flops": 1e7}):  # a batch may be text alone
        meter.add({**row, **towers})
    values, _ = meter.read(3)
    total = values["flops_per_second"] * values["seconds_per_step"] * 3
    assert total == pytest.approx(60 * 1e6 + 6e7)
    assert values["mfu"] == pytest.approx(values["flops_per_second"] / 1e12)

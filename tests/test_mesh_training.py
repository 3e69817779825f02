"""Whole models on a mesh of 8 devices: the loss, every gradient and every answer of one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gemma4_jax.config import ModelConfig
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.model.parameters import arrays, is_trainable, map_arrays, variables, with_arrays
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.quant import policy
from gemma4_jax.quant.activations import scales
from gemma4_jax.quant.policy import QuantConfig
from gemma4_jax.sharding import make_mesh, parameter_shardings, place_batch
from gemma4_jax.train.loss import loss_sum

ROWS, LENGTH = 8, 128
DENSE = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 4, "fsdp": 2},
    {"context": 4, "fsdp": 2},
    {"data": 2, "context": 2, "tensor": 2},
]
MESHES = {
    "tiny_e2b": DENSE,
    "tiny_e4b": DENSE,
    "tiny_26b_a4b": [*DENSE, {"expert": 4, "fsdp": 2}, {"expert": 2, "context": 2, "tensor": 2}],
    "tiny_31b": DENSE,
}
SIZES = {
    "tiny_e2b": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "tiny_e4b": {"num_hidden_layers": 12, "num_kv_shared_layers": 6},
    "tiny_26b_a4b": {"num_hidden_layers": 6},
    "tiny_31b": {"num_hidden_layers": 6},
}
CASES: list[Any] = [
    pytest.param(name, mesh, task, marks=[pytest.mark.exhaustive] * ((i + j) % 2 != turn and "expert" not in mesh))
    for i, (name, meshes) in enumerate(MESHES.items())
    for j, mesh in enumerate(meshes)
    for turn, task in enumerate(("sft", "qat"))
]
"""Each model on each mesh, with the two tasks taking turns; the other half is left to `--exhaustive`."""
CASES += [
    ("tiny_e2b", {"tensor": 4, "fsdp": 2}, "learned"),
    ("tiny_26b_a4b", {"expert": 4, "fsdp": 2}, "learned"),
    ("tiny_e2b", {"tensor": 4, "fsdp": 2}, "static"),
]
QUANT = {
    "qat": {name: QuantConfig() for name in MESHES},
    "learned": {
        "tiny_e2b": QuantConfig(policy="mobile", activations="none", kv_cache="none", learn_scales=True),
        "tiny_26b_a4b": QuantConfig(policy="int8", learn_scales=True, gradient="clipped"),
    },
    "static": {"tiny_e2b": QuantConfig(policy="mobile")},
}
STATIC_SCALE = 0.03
"""Of every activation; values beyond 3.8 are clipped."""


def described(value) -> str:
    return "_".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else str(value)


@functools.cache
def random_model(name: str) -> Transformer:
    """Everything random; head norms small, as trained ones are: with scores of 8 and more float32 itself is only 1e-4 exact."""
    model, rng = init(ModelConfig.variant(name, **SIZES[name])), np.random.default_rng(0)

    def draw(path, variable):
        value = np.asarray(variable.get_value())
        if path.endswith(".w"):
            return jnp.asarray(value)
        mean = 0.3 if path.endswith(("q_norm.scale", "k_norm.scale")) else 1.0
        return jnp.asarray((mean * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32))

    return map_arrays(draw, model)


def batch_of(vocabulary: int) -> dict[str, np.ndarray]:
    """Packed and padded rows, the trained tokens dealt out unevenly."""
    rng = np.random.default_rng(1)
    positions = np.full((ROWS, LENGTH), -1, np.int32)
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        start = 0 if row % 2 else 5
        for number, size in enumerate((20 + 5 * row, 40), 1):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number
            start += size
    tokens, targets = rng.integers(3, vocabulary, (2, ROWS, LENGTH)).astype(np.int32)
    trained = (rng.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None]) & (positions >= 0)
    names = ("tokens", "positions", "segment_ids", "targets", "loss_weights")
    return dict(zip(names, (tokens, positions, segments, targets, trained.astype(np.float32)), strict=True))


@functools.partial(quick.jit, static_argnames="distill")
def losses(model: Transformer, teacher: Transformer | None, batch, *, distill: float):
    def loss(values):
        return loss_sum(with_arrays(model, values), batch, teacher=teacher, distill_weight=distill)[0]

    return jax.value_and_grad(loss)(arrays(model))


def loss_and_gradients(name: str, task: str, mesh: jax.sharding.Mesh | None):
    model, teacher = random_model(name), None
    if task in QUANT:
        teacher = model
        model = policy.apply(model, QUANT[task][name])
        model = with_arrays(model, {**arrays(model), **{key: x + STATIC_SCALE for key, x in scales(model).items()}})
    if mesh is not None:
        place = parameter_shardings(mesh)
        both: Any = model, teacher
        model, teacher = (
            map_arrays(lambda path, v: jax.device_put(v.get_value(), place(path, v)), each) for each in both
        )
    batch = batch_of(model.cfg.vocab_size)
    distill = 0.5 if task in QUANT else 0.0
    if mesh is None:
        return jax.device_get(losses(model, teacher, batch, distill=distill))
    with jax.set_mesh(mesh):
        loss, gradients = losses(model, teacher, place_batch(batch), distill=distill)
        return jax.device_get((loss, gradients))


@functools.cache
def alone(name: str, task: str):
    return loss_and_gradients(name, task, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "task"), CASES, ids=described)
def test_loss_and_gradients_are_those_of_one_device(name, mesh, task):
    expected_loss, expected = alone(name, task)
    loss, gradients = loss_and_gradients(name, task, make_mesh(mesh))
    if task == "static":  # a last bit moves an activation by a whole step
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)
        return
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    model = random_model(name)
    for path, variable in variables(policy.apply(model, QUANT[task][name]) if task in QUANT else model).items():
        if is_trainable(variable):
            size = np.linalg.norm(expected[path])
            assert size > 0, path
            assert np.linalg.norm(gradients[path] - expected[path]) < 1e-4 * size, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("tiny_31b", {"tensor": 8}),
        ("tiny_e2b", {"tensor": 4, "context": 2}),
        ("tiny_26b_a4b", {"tensor": 2, "expert": 4}),
        ("tiny_26b_a4b", {"expert": 2, "context": 4}),
    ],
    ids=described,
)
def test_decoding_gives_the_answers_of_one_device(name, mesh):
    """Prompts and answers that run past the window of 64."""
    model = random_model(name)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, model.cfg.vocab_size, size).tolist() for size in (3, 50, 90)]

    def answers(model):
        sampler = Sampler(model, max_length=128, batch_size=4)
        return sampler.generate(prompts, max_new_tokens=24, temperature=0.0, stop=[])

    expected = answers(model)
    with jax.set_mesh(make_mesh(mesh)) as _:
        place = parameter_shardings(make_mesh(mesh))
        found = answers(map_arrays(lambda path, v: jax.device_put(v.get_value(), place(path, v)), model))
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)

"""Our model against the numbers of transformers: logits, intermediates, loss, gradients, packing, greedy decoding.

Fixtures and tolerances with their reasons: tests/golden/README.md and expected.json.
"""
# numpy arrays and doubles stand in for what the code is typed with:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false, reportMissingImports=false

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.checkpoint.hf import read_config
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.names import table
from gemma4_jax.infer.generate import Sampler
from gemma4_jax.model.decode import unroll
from gemma4_jax.model.kv import KV, producers
from gemma4_jax.model.norm import rms_norm
from gemma4_jax.model.parameters import arrays, is_trainable, variables
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.train.loss import loss_sum

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b")


class Golden(NamedTuple):
    """A fixture, our model of it, and what one pass forward and back gave."""

    model: Transformer
    numbers: dict[str, np.ndarray]
    facts: dict[str, Any]
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]  # under the names of the file, in its layout

    def tolerance(self, name: str) -> float:
        return self.facts["tolerances"][name]["value"]


@functools.cache
def golden(variant: str) -> Golden:
    directory = GOLDEN / variant
    with np.load(directory / "expected.npz") as file:
        numbers = dict(file)
    facts = json.loads((directory / "expected.json").read_text())
    model = load(directory, dtype="float32", text_only=True)
    batch = batch_of(numbers)

    def forward(model):
        total, _ = loss_sum(model, batch)
        return total / jnp.sum(batch["loss_weights"]), model(batch["tokens"], batch["positions"])

    (loss, logits), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(model)
    return Golden(model, numbers, facts, np.asarray(logits), float(loss), in_file_layout(model, grads))


def batch_of(numbers: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    mask, labels = numbers["attention_mask"], numbers["labels"]
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    return {
        "tokens": jnp.asarray(numbers["tokens"], jnp.int32),
        "positions": jnp.asarray(np.where(mask == 1, numbers["position_ids"], -1), jnp.int32),
        "segment_ids": jnp.asarray(mask, jnp.int32),
        "targets": jnp.asarray(np.maximum(targets, 0), jnp.int32),
        "loss_weights": jnp.asarray(targets != -100, jnp.float32),
    }


def in_file_layout(model: Transformer, gradients: Transformer) -> dict[str, np.ndarray]:
    trained = {name for name, variable in variables(model).items() if is_trainable(variable)}
    ours = {name: np.ascontiguousarray(value) for name, value in arrays(gradients).items()}
    entries = table(model.cfg).items()
    return {name: e.view(ours[e.parameter][e.index]) for name, e in entries if e.parameter in trained}


def without_prefix(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_padded_rows(variant: str):
    g = golden(variant)
    real = g.numbers["attention_mask"] == 1
    difference = np.abs(g.logits - g.numbers["logits"])[real]
    assert 3 < g.numbers["logits"][real].std() < 5
    assert difference.max() <= g.tolerance("logits_max")
    assert difference.mean() <= g.tolerance("logits_mean")


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_norm(variant: str):
    g = golden(variant)
    assert g.loss == pytest.approx(g.facts["loss"], rel=g.tolerance("loss_relative"))
    expected = {without_prefix(name): norm for name, norm in g.facts["gradient_norms"].items()}
    assert expected.keys() == g.gradients.keys()
    for name, norm in expected.items():
        # torch gives row 0 of a lookup table no gradient (padding_idx); the stored norms leave it out.
        ours = g.gradients[name][1:] if name.startswith("embed_tokens") else g.gradients[name]
        assert np.linalg.norm(ours) == pytest.approx(norm, rel=g.tolerance("gradient_norm_relative")), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_gradients_of_small_tensors(variant: str):
    g = golden(variant)
    rows = g.numbers["gradient_rows"]
    compared = 0
    for key, expected in g.numbers.items():
        kind, _, name = key.partition("/")
        if kind == "gradient":
            ours = g.gradients[without_prefix(name)]
        elif kind == "gradient_rows" and name:
            ours = g.gradients[f"{without_prefix(name)}.weight"][rows]
        else:
            continue
        compared += 1
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error <= g.tolerance("gradient_relative"), key
    assert compared >= 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_intermediates_layer_by_layer(variant: str):
    g = golden(variant)
    batch = batch_of(g.numbers)
    seen = jax.jit(every_layer)(g.model, batch["tokens"], batch["positions"])
    at = g.numbers["hidden_positions"]
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(seen["embeddings"][0, at], g.numbers["embeddings"], atol=1e-6)
    close(np.stack([h[0, at] for h in seen["hidden"]]), g.numbers["hidden_states"], atol=g.tolerance("hidden_max"))
    close(seen["final"][0, at], g.numbers["final_norm"], atol=g.tolerance("hidden_max"))
    small = g.tolerance("intermediate_max")
    for kind, layer in producers(g.model.cfg).items():
        assert layer == g.numbers[f"kv_{kind}_layer"]
        k, v = seen["kv"][layer]
        close(k[0], g.numbers[f"kv_{kind}_k"], atol=small)
        close(v[0], g.numbers[f"kv_{kind}_v"], atol=small)
    if "ple_inputs" in g.numbers:
        close(
            np.moveaxis(seen["per_layer"][:, 0, g.numbers["ple_positions"]], 0, 1), g.numbers["ple_inputs"], atol=small
        )
    # The same layers scanned and unrolled: only the order of additions inside fused loops may differ.
    scanned = jax.jit(lambda m: m.hidden(batch["tokens"], batch["positions"]))(g.model)
    real = np.asarray(batch["positions"]) >= 0
    close(np.asarray(scanned)[real], np.asarray(seen["final"])[real], atol=2e-4)


def every_layer(model: Transformer, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
    """A forward pass by hand over the unrolled layers, keeping everything."""
    decoder = unroll(model)
    places = decoder.places(positions)
    h, per_layer = decoder.embed_tokens(tokens, decoder.per_layer)
    out: dict[str, Any] = {"embeddings": h, "per_layer": per_layer, "hidden": [], "kv": []}
    own = producers(model.cfg)
    for index, layer in enumerate(decoder.layers):
        shares = layer.attention.k is None
        source = out["kv"][own[layer.attention.kind]] if shares else None

        def keep(k, v):
            return KV(k, v, positions)

        h, kv, _ = layer(h, None if per_layer is None else per_layer[index], places, keep(*source) if source else keep)
        out["hidden"].append(h)
        out["kv"].append((kv.k, kv.v))
    return out | {"final": decoder.final_norm(h)}


def test_router_and_experts():
    g = golden("tiny_26b_a4b")
    n = g.numbers
    sparse = unroll(g.model).layers[int(n["moe_layer"])].sparse
    assert sparse is not None
    residual = jnp.asarray(n["moe_router_input"])
    routing = sparse.router(residual[None])
    weights, index = routing.weights[0], routing.index[0]
    at, small = n["hidden_positions"], g.tolerance("intermediate_max")
    order = np.argsort(np.asarray(index), axis=1)
    theirs = np.argsort(n["moe_index"][at], axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(index), order, 1), np.take_along_axis(n["moe_index"][at], theirs, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights), order, 1),
        np.take_along_axis(n["moe_weights"][at], theirs, 1),
        atol=small,
    )
    np.testing.assert_allclose(sparse.pre_norm(residual), n["moe_experts_input"], rtol=0, atol=small)
    out = sparse.experts(jnp.asarray(n["moe_experts_input"])[None], routing.weights, routing.index)[0]
    np.testing.assert_allclose(out, n["moe_experts_output"], rtol=0, atol=small)
    assert not np.allclose(rms_norm(out, 1e-6), out)  # the next norm hides a wrong scale: hence the values before it


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_row(variant: str):
    g = golden(variant)
    positions = jnp.asarray(g.numbers["packed_position_ids"], jnp.int32)
    segments = 1 + jnp.cumsum(positions[:, 1:] == 0, axis=1, dtype=jnp.int32)
    segments = jnp.concatenate([jnp.ones_like(segments[:, :1]), segments], axis=1)
    assert int(segments.max()) == 2
    tokens = jnp.asarray(g.numbers["packed_tokens"], jnp.int32)
    logits = jax.jit(lambda m: m(tokens, positions, segments))(g.model)
    difference = np.abs(np.asarray(logits) - g.numbers["packed_logits"])
    assert difference.max() <= g.tolerance("logits_max")
    assert difference.mean() <= g.tolerance("logits_mean")


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_through_the_cache(variant: str):
    g = golden(variant)
    mask = g.numbers["prompt_attention_mask"] == 1
    prompts = [row[keep].tolist() for row, keep in zip(g.numbers["prompt_tokens"], mask, strict=True)]
    sampler = Sampler(g.model, None, max_length=80, batch_size=2)
    found = sampler.generate(prompts, max_new_tokens=40, temperature=0.0, stop=[])
    assert [c.tokens for c in found] == g.numbers["greedy_tokens"].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_of_the_fixture(variant: str):
    cfg = read_config(GOLDEN / variant)
    assert cfg.sliding_window == 16
    assert cfg == type(cfg).from_hf(cfg.to_hf(spelling="old"))
    assert cfg == type(cfg).from_hf(cfg.to_hf(spelling="new"))

"""Quantised models beside their float reference: the numbers, what training won back, and `task=eval` with `eval.against`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from gemma4_jax import assets
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.eval.quality import Quality, divergence, plot, recovered, report
from gemma4_jax.model.parameters import arrays, map_arrays, with_arrays
from gemma4_jax.model.transformer import Transformer, init
from gemma4_jax.processor import Processor
from gemma4_jax.quant.policy import QuantConfig, apply
from gemma4_jax.sharding import make_mesh, parameter_shardings
from launch.answering import run_eval
from launch.run import load_config
from launch.settings import EvalRun, read

VOCABULARY = Processor.load(assets.TOKENIZER).vocab_size
SIZES = dict(num_hidden_layers=6, hidden_size=32, intermediate_size=32, head_dim=32, global_head_dim=32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return init(ModelConfig.variant("tiny_31b", vocab_size=VOCABULARY, **SIZES), 3)


def moved(model: Transformer) -> Transformer:
    """Other weights on a grid: as if trained."""
    values = {name: x * 1.02 if x.ndim > 1 else x for name, x in arrays(model).items()}
    return apply(with_arrays(model, values), QuantConfig())


def test_numbers_are_those_of_the_logits(model):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, VOCABULARY, (2, 2, 70)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(70, dtype=np.int32), (2, 70)),
        "segment_ids": np.ones((2, 70), np.int32),
        "targets": targets,
        "loss_weights": (rng.random((2, 70)) < 0.5).astype(np.float32),
    }
    other = moved(model)
    found = divergence(other, model, [batch, batch])
    log_q, log_r = (
        log_softmax(np.asarray(jax.jit(lambda m, t: m(t))(one, tokens), np.float64), -1) for one in (other, model)
    )
    weight = batch["loss_weights"] / batch["loss_weights"].sum()
    ce = -(weight * np.take_along_axis(log_q, targets[..., None], -1)[..., 0]).sum()
    assert found["perplexity"] == pytest.approx(np.exp(ce), rel=1e-5)
    assert found["kl"] == pytest.approx((weight * (np.exp(log_r) * (log_r - log_q)).sum(-1)).sum(), rel=1e-3)
    assert found["agreement"] == pytest.approx((weight * (log_q.argmax(-1) == log_r.argmax(-1))).sum(), abs=1e-6)
    assert found["tokens"] == 2 * batch["loss_weights"].sum()
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    place = parameter_shardings(mesh)
    one, two = (map_arrays(lambda name, v: jax.device_put(v.get_value(), place(name, v)), x) for x in (other, model))
    with jax.set_mesh(mesh):
        cut = divergence(one, two, [batch, batch])
    assert cut == pytest.approx(found, rel=1e-4)
    with pytest.raises(UserError, match="no trained token"):
        divergence(other, model, [{**batch, "loss_weights": jnp.zeros((2, 70))}])


def test_what_training_won_back():
    found = [
        Quality("float", "float32", 10.0, 0.0, 1.0),
        Quality("a rounded", "q4_0", 14.0, 0.2, 0.8),
        Quality("a", "q4_0", 11.0, 0.1, 0.9, rounded="a rounded"),
        Quality("b rounded", "q8_0", 9.9, 0.0, 1.0),
        Quality("b", "q8_0", 10.1, 0.0, 1.0, rounded="b rounded"),
    ]
    assert recovered(found) == {"a": 0.75}  # rounding lost nothing in b, so there is nothing to win back
    lines = report(found).splitlines()
    assert "75.0 %" in lines[4]
    assert "+4.0000" in lines[3]


def test_checkpoints_are_laid_beside_the_model(model, tmp_path):
    save_model(model, tmp_path / "float")
    save_model(moved(model), tmp_path / "qat")
    other = init(ModelConfig.variant("tiny_31b", vocab_size=VOCABULARY, **{**SIZES, "intermediate_size": 64}))
    save_model(other, tmp_path / "other")

    def evaluate(path: str) -> tuple[dict[str, float], str]:
        mapping = load_config("configs/tiny_eval.py")
        mapping["workdir"], mapping["model"]["path"] = str(tmp_path / "report"), str(tmp_path / "float")
        mapping["eval"] |= {"metrics": ("perplexity",), "against": {"q4_0": path}, "max_examples": 8}
        run, said = read(mapping), []
        assert isinstance(run, EvalRun)
        return run_eval(run, said.append), "\n".join(said)

    numbers, said = evaluate(str(tmp_path / "qat"))
    assert {"float.perplexity", "q4_0 rounded.kl", "q4_0.agreement"} <= numbers.keys()
    assert numbers["float.kl"] == 0
    assert numbers["float.agreement"] == 1
    assert 0 < numbers["q4_0 rounded.kl"] != numbers["q4_0.kl"] > 0
    assert "top-1 of float" in said
    kept = json.loads((tmp_path / "report" / "quality.json").read_text())
    assert [one["name"] for one in kept] == ["float", "q4_0 rounded", "q4_0"]
    with pytest.raises(UserError, match=r"eval.against.q4_0: .*other holds another model"):
        evaluate(str(tmp_path / "other"))


def test_only_what_can_be_compared_is_asked_for():
    mapping = load_config("configs/tiny_eval.py")
    mapping["eval"] |= {"metrics": ("exact_match",), "against": {"q4_0": "somewhere"}}
    with pytest.raises(UserError, match=r"eval\.against compares perplexity"):
        read(mapping)
    mapping["eval"] |= {"metrics": ("perplexity",)}
    mapping["sample"]["packed"] = True
    with pytest.raises(UserError, match=r"leave config\.sample\.packed out"):
        read(mapping)


def test_the_bars_are_drawn(tmp_path):
    found = [
        Quality("float", "float32", 10.0, 0.0, 1.0),
        Quality("a rounded", "q4_0", 14.0, 0.2, 0.8),
        Quality("a", "q4_0", 11.0, 0.1, 0.9, rounded="a rounded"),
    ]
    plot(found, str(tmp_path / "quality.svg"))
    drawing = (tmp_path / "quality.svg").read_text()
    for words in (
        "rounded after training",
        "perplexity above float (10.000)",
        " 4.000 ",
        " 1.000 ",
    ):  # the heights of both bars
        assert f"<!-- {words.strip()} -->" in drawing

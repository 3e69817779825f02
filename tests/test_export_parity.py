"""Live against the programs that the exports are for (`make parity`): transformers, compressed-tensors, llama.cpp.

llama.cpp's own converter is a script of its source, not of a wheel: LLAMA_CPP_SOURCE names a checkout (or the unpacked source of
`xllamacpp`, thirdparty/llama.cpp), and without it that comparison is skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exporting import on_policy, random_model

from gemma4_jax import assets
from gemma4_jax.checkpoint import gguf_tokenizer
from gemma4_jax.checkpoint.exports import export
from gemma4_jax.checkpoint.gguf_file import read_header
from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.config import VARIANTS
from gemma4_jax.quant import policy
from gemma4_jax.tokenizer import SPECIAL_PIECES

GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.parity
COVER = ("attention", "ffw", "ffw_shared", "embedding", "per_layer")


def golden(variant: str):
    """The random checkpoint of the golden fixtures: drawn so that logits are of the size of real ones."""
    return load(GOLDEN / variant, dtype="float32", text_only=True)


def tokens(count: int = 2, length: int = 40, below: int = 320) -> np.ndarray:
    """Random ids, none of them padding."""
    return np.random.default_rng(3).integers(3, below, (count, length))


def theirs(directory: Path, home: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits, in a process of its own; missing, unexpected or misshaped tensors are an error."""
    np.savez(home / "inputs.npz", tokens=ids)
    script = [
        sys.executable,
        str(GOLDEN / "live_transformers.py"),
        str(directory),
        str(home / "inputs.npz"),
        str(home / "out.npz"),
    ]
    subprocess.run(script, check=True)
    with np.load(home / "out.npz") as file:
        return file["logits"]


def ours(model, ids: np.ndarray) -> np.ndarray:
    """Our logits of the model that was exported, on its grids."""
    return np.asarray(jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids, jnp.int32)))


def check(model, directory: Path, home: Path) -> None:
    difference = np.abs(ours(model, tokens()) - theirs(directory, home, tokens()))
    # As in the golden fixtures: the reference's own attention kernels differ by up to 4e-4.
    assert difference.max() <= 1e-3


@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_26b_a4b"])
def test_transformers_on_the_bfloat16_lattice(variant, tmp_path):
    model = policy.snap(on_policy(golden(variant), "q4_0"))
    export(on_policy(golden(variant), "q4_0"), tmp_path / "hf", format="hf", dtype="float32")
    check(model, tmp_path / "hf", tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
@pytest.mark.parametrize(("variant", "name"), [("tiny_e2b", "w4a16"), ("tiny_26b_a4b", "w4a16"), ("tiny_31b", "int8")])
def test_transformers_on_compressed_tensors(variant, name, tmp_path):
    model = on_policy(golden(variant), name)
    export(model, tmp_path / "ct", format="compressed-tensors", dtype="float32")
    check(model, tmp_path / "ct", tmp_path)


def test_transformers_on_mobile(tmp_path):
    """The per-layer table with one scale a row, which is all that transformers 5.23 loads (see checkpoint/mobile.py)."""
    model = on_policy(golden("tiny_e2b"), "mobile", cover=COVER)
    export(model, tmp_path / "m", format="mobile", dtype="float32")
    check(model, tmp_path / "m", tmp_path)


def test_transformers_on_mobile_with_static_activations(tmp_path):
    """Sequences of one token: where two attention kernels differ in the last bit, a rounded activation differs by a whole step."""
    model = calibrate(on_policy(golden("tiny_e2b"), "mobile", cover=COVER))
    export(model, tmp_path / "m", format="mobile", dtype="float32")
    alone = tokens(64, 1)
    got, wanted = theirs(tmp_path / "m", tmp_path, alone), ours(model, alone)
    close = np.abs(got - wanted).max(axis=-1) <= 1e-3
    assert close.mean() >= 0.5  # measured: 0.75, and all without activations
    assert np.abs(wanted - ours(policy.without(model), alone)).max() > 1e-2


def calibrate(model):
    """Static int8 activations with scales that fit activations of about 1."""
    from gemma4_jax.model.parameters import map_arrays
    from gemma4_jax.quant.activations import set_activations

    rounding = set_activations(model, "static", "none")
    return map_arrays(
        lambda name, variable: (
            jnp.full_like(variable.get_value(), 0.05)
            if name.endswith(("input_scale", "output_scale"))
            else variable.get_value()
        ),
        rounding,
    )


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b"])
def test_llama_cpp_computes_the_same(variant, tmp_path):
    """float32 GGUF of a random model; `benchmarks.llama_cpp` compares trained ones.

    All experts are chosen: a random router finds many nearly equal, and a change of 1e-4 in the weights moves log p by 1.7.
    """
    everyone = {"top_k_experts": VARIANTS[variant]["num_experts"]} if variant == "tiny_26b_a4b" else {}
    model = policy.snap(on_policy(random_model(variant, **everyone), "q4_0"))
    export(model, tmp_path / "m.gguf", format="gguf", dtype="float32", tokenizer=assets.TOKENIZER)
    prompts = tokens(4, 24, 896)
    script = (
        "import json, sys, xllamacpp as x\n"
        "p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.n_parallel = 1; p.warmup = False\n"
        "server = x.Server(p)\n"
        "asked = dict(n_predict=1, temperature=0.0, n_probs=5, cache_prompt=False)\n"
        "ask = lambda ids: server.handle_completions(asked | dict(prompt=ids))\n"
        "found = [ask(ids)['choices'][0]['logprobs']['content'][0]['top_logprobs'] for ids in json.loads(sys.argv[2])]\n"
        "open(sys.argv[3], 'w').write(json.dumps(found))\n"
    )
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-c", script, str(tmp_path / "m.gguf"), json.dumps(prompts.tolist()), str(answer)]
    subprocess.run(command, check=True, capture_output=True)
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(prompts, jnp.int32))
    logprobs = np.asarray(jax.nn.log_softmax(logits[:, -1]))
    for row, given in zip(logprobs, json.loads(answer.read_text()), strict=True):
        assert row[given[0]["id"]] >= row.max() - 0.06  # random models have ties
        # Keys and values are float16 there, and so is its table of GELU; measured: 0.037.
        assert max(abs(entry["logprob"] - row[entry["id"]]) for entry in given) <= 0.06


@pytest.mark.skipif("LLAMA_CPP_SOURCE" not in os.environ, reason="LLAMA_CPP_SOURCE names no source of llama.cpp")
@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_e4b", "tiny_26b_a4b", "tiny_31b"])
def test_a_float_file_is_what_llama_cpps_converter_writes(variant, tmp_path):
    home = tmp_path / "hf"
    save_hf(random_model(variant), home, dtype="float32", spelling="old")
    pieces = gguf_tokenizer.to_json(gguf_tokenizer.metadata_of(assets.TOKENIZER, 896), "")
    (home / "tokenizer.json").write_text(json.dumps(pieces, ensure_ascii=False))
    core = {f"{name}_token": SPECIAL_PIECES[name] for name in ("bos", "eos", "pad", "unk")} | {"mask_token": "<mask>"}
    more = {
        f"{name}_token": piece
        for name, piece in SPECIAL_PIECES.items()
        if f"{name}_token" not in core and name != "newline"
    }
    (home / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer", **core, "extra_special_tokens": more})
    )
    converter = Path(os.environ["LLAMA_CPP_SOURCE"]) / "convert_hf_to_gguf.py"
    command = [
        sys.executable,
        str(converter),
        str(home),
        "--outtype",
        "f32",
        "--outfile",
        str(tmp_path / "theirs.gguf"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    export(home, tmp_path / "ours.gguf", format="gguf", dtype="float32", tokenizer=home, name="Hf")
    (wanted, places), (got, own) = (read_header(tmp_path / f"{side}.gguf") for side in ("theirs", "ours"))
    assert got == wanted
    assert own.keys() == places.keys()
    theirs_raw, ours_raw = (tmp_path / "theirs.gguf").read_bytes(), (tmp_path / "ours.gguf").read_bytes()
    for name, place in places.items():
        mine = own[name]
        assert (mine.shape, mine.type) == (place.shape, place.type)
        assert ours_raw[mine.start :][: mine.size] == theirs_raw[place.start :][: place.size], name

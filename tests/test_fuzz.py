"""Broken files at every front end: the first cases of `tests/fuzz.py`, which goes on for as long as wanted."""

import importlib.util

import pytest
from fuzz import WHAT, fuzz

NEEDS = {"image": "PIL", "sound": "soundfile", "video": "av"}


@pytest.mark.parametrize("name", WHAT)
def test_a_broken_file_is_read_or_refused_in_a_sentence(name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    cases, refused, wrong = fuzz(WHAT[name], seconds=60, seed=1, most=30 if name == "rows" else 150)
    assert not wrong
    assert cases >= 20
    assert refused or name == "rows"  # bad rows are counted, not refused


def test_numbers_no_model_has_are_refused():
    from gemma4_jax.config import ModelConfig
    from gemma4_jax.errors import UserError

    for field, value in {
        "num_hidden_layers": 12 * 10**9,
        "num_key_value_heads": 0,
        "hidden_size": -4,
        "vocab_size": 2**40,
        "rms_norm_eps": 0.0,
        "sliding_window": 2.5,
    }.items():
        with pytest.raises(UserError, match=field):
            ModelConfig.variant("tiny_31b", **{field: value})


def test_a_message_never_quotes_a_whole_file():
    from gemma4_jax.errors import UserError

    text = str(UserError("The name is " + "x" * 100_000 + "\x1b[31m."))
    assert len(text) < 2000
    assert text.isprintable()

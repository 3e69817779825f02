"""Orbax: what is committed comes back exactly, what should go goes, and what is wrong is named."""

import json
import logging
import math
import os
import resource
import shutil
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint_hf import SMALL, random_model, same_arrays

from gemma4_jax.checkpoint import store as store_module
from gemma4_jax.checkpoint.digest import digests
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import Store, config_of, load_model, model_meta, save_model
from gemma4_jax.config import ModelConfig, Rope
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays
from gemma4_jax.quant.policy import QuantConfig, apply, grid_names


def state(step: int) -> dict[str, jax.Array]:
    """A little training state whose values name their step."""
    return {
        "step": jnp.int32(step),
        "params.own.w": jnp.full((8, 4), step, jnp.bfloat16),
        "opt.mu.own.w": jnp.full((8, 4), step + 0.5, jnp.float32),
    }


def filled(directory, metrics=(), **options) -> Store:
    """A closed store to which steps 1, 2, ... were saved with these losses."""
    store = Store(directory, **options)
    for step, loss in enumerate(metrics, 1):
        store.save(step, state(step), {"data": {"next": step}}, None if loss is None else {"loss": loss, "other": 1.0})
    store.close()
    return store


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig.variant("tiny_31b", **SMALL, rope_full=Rope(5e5, 0.5)))


def run_state(model, done: int) -> dict[str, jax.Array]:
    """A training state as `train.state` lays it out: buffers frozen, an optimizer beside the parameters."""
    out: dict[str, jax.Array] = {"step": jnp.int32(done)}
    for name, value in arrays(model).items():
        out[f"{'frozen' if name.endswith('layer_scalar') else 'params'}.{name}"] = value
        out[f"opt.mu.{name}"] = jnp.zeros_like(value)
    return out


def test_state_comes_back_exactly_where_like_says(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    saved = {**state(3), "params.own.w": jax.device_put(state(3)["params.own.w"], split)}
    meta = {"data": {"next": 7, "name": "é"}, "list": [1, 2.5, None, True]}
    with Store(tmp_path / "run") as store:
        assert store.latest() is None
        assert store.best() is None
        assert store.save(3, saved, meta)
        store.wait()
        assert store.latest() == 3
        like = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for name, v in saved.items()}
        for target in (like, saved):
            values, again = store.restore(3, target)
            assert again == meta
            assert values.keys() == saved.keys()
            for name, value in values.items():
                assert value.dtype == saved[name].dtype
                assert value.sharding == saved[name].sharding
                np.testing.assert_array_equal(np.asarray(value), np.asarray(saved[name]))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree), donate_argnums=0)
    now = {"params.w": jnp.zeros((256, 1024), jnp.float32), "step": jnp.int32(0)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), now)
    with Store(tmp_path / "run", keep=10) as store:
        for step in range(1, 6):
            now = bump(now)
            store.save(step, now, {})
        for _ in range(10):
            now = bump(now)
        store.wait()
        for step in range(1, 6):
            values, _ = store.restore(step, like)
            assert float(jnp.min(values["params.w"])) == float(jnp.max(values["params.w"])) == step


@pytest.mark.parametrize(
    ("options", "losses", "kept", "best"),
    [
        (dict(keep=2), [3.0, 1.0, 2.0, 4.0, 5.0], [4, 5], None),
        (dict(keep=2, metric="loss"), [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
        (dict(keep=1, metric="loss", keep_best=2), [3.0, 1.0, 2.0, 4.0, 5.0], [2, 3, 5], 2),
        (dict(keep=1, metric="loss", mode="max"), [3.0, 9.0, 2.0, 4.0, 5.0], [2, 5], 2),
        (dict(keep=1, metric="loss"), [math.nan, 3.0, math.nan, None], [2, 4], 2),
        (dict(keep=1, metric="loss"), [None, None], [2], None),
        (dict(keep=1, metric="loss"), [math.nan], [1], None),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, options, losses, kept, best):
    store = filled(tmp_path / "run", losses, **options)
    assert store.steps() == kept
    assert store.best() == best
    for step in kept:
        values, meta = store.restore(step, state(0))
        assert int(values["step"]) == step
        assert meta == {"data": {"next": step}}


def test_what_is_saved_when(tmp_path):
    with Store(tmp_path / "run", save_every=2, keep=9) as store:
        started = [store.save(step, state(step), {}) for step in (1, 2, 3, 4)]
        assert started == [False, True, False, True]
        assert store.save(5, state(5), {}, force=True)
        assert not store.save(5, state(5), {}, force=True)
        with pytest.raises(UserError, match="already holds step 5, so step 4 cannot be saved"):
            store.save(4, state(4), {})
        store.wait()
        assert store.steps() == [2, 4, 5]


def test_leftovers_of_a_killed_run_are_ignored_then_cleaned(tmp_path):
    filled(tmp_path / "run", [1.0])
    leftover = tmp_path / "run" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "1", leftover)
    (leftover / "commit_success.txt").unlink()
    with Store(tmp_path / "run") as store:
        assert store.latest() == 1
        assert store.save(2, state(2), {})
    assert store.latest() == 2
    assert not leftover.exists()


def test_wrong_names_shapes_dtypes_and_steps_are_listed(tmp_path):
    store = filled(tmp_path / "run", [1.0])
    with pytest.raises(UserError, match="has no step 9; committed steps: 1"):
        store.restore(9, state(1))
    like = {**state(1), "opt.nu.own.w": jnp.zeros(3), "params.own.w": jnp.zeros((8, 5), jnp.bfloat16)}
    del like["step"]
    like["opt.mu.own.w"] = like["opt.mu.own.w"].astype(jnp.bfloat16)
    with pytest.raises(UserError) as error:
        store.restore(1, like)
    text = str(error.value)
    assert "is a checkpoint of another model, optimizer or dtype: 1 missing: opt.nu.own.w; 1 unexpected: step" in text
    assert "params.own.w (wanted bfloat16[8, 5], got bfloat16[8, 4])" in text
    assert "opt.mu.own.w (wanted bfloat16[8, 4], got float32[8, 4])" in text


def _cut_data(step):
    files = [file for file in step.rglob("d/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        _cut_data,
        lambda step: shutil.rmtree(step / "state"),
        lambda step: shutil.rmtree(step / "meta"),
        lambda step: (step / "state" / "_METADATA").write_text("{"),
        lambda step: (step / "meta" / "metadata").write_text("{"),
    ],
    ids=["cut", "no state", "no meta", "state metadata", "meta"],
)
def test_damaged_steps_are_named_and_not_stepped_over(tmp_path, damage):
    store = filled(tmp_path / "run", [1.0, 2.0])
    damage(tmp_path / "run" / "2")
    assert store.latest() == 2
    with pytest.raises(UserError, match="run/2 is damaged"):
        store.restore(2, state(0))
    assert int(store.restore(1, state(0))[0]["step"]) == 1


def test_a_training_run_is_read_as_a_model(model, tmp_path, monkeypatch):
    other = random_model(model.cfg, seed=1)
    workdir = tmp_path / "run"
    with Store(workdir / "checkpoints", metric="loss") as store:
        for step, (each, loss) in enumerate([(model, 1.0), (other, 2.0)], 1):
            store.save(step, run_state(each, step), {"model": model_meta(each)}, {"loss": loss})
    read = []
    read_arrays = store_module.read_arrays
    monkeypatch.setattr(store_module, "read_arrays", lambda d, like: (read.extend(like), read_arrays(d, like))[1])
    (workdir / "config.json").write_text("{}")  # of whatever else keeps its files there
    for path, step, want in [
        (workdir, "latest", other),
        (workdir, "best", model),
        (workdir, 1, model),
        (workdir / "checkpoints", "latest", other),
        (workdir / "checkpoints" / "1", "latest", model),
    ]:
        assert same_arrays(load(path, step=step), want)
    assert not [name for name in read if name.startswith(("opt.", "step"))]
    with pytest.raises(UserError, match="has no step 7; committed steps: 1, 2"):
        load(workdir, step=7)


def test_model_directories_keep_config_dtypes_and_placement(model, tmp_path):
    save_model(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert same_arrays(again, model)
    assert again.cfg == model.cfg
    assert again.cfg.rope_full == Rope(5e5, 0.5)
    wide = load(tmp_path / "model", dtype="float32", compute_dtype="bfloat16")
    assert wide.compute_dtype == "bfloat16"
    for name, value in arrays(wide).items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(value), np.asarray(arrays(model)[name]).astype(np.float32))
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
    placed = load_model(tmp_path / "model", shardings=lambda _name, _variable: everywhere)
    assert {value.sharding for value in arrays(placed).values()} == {everywhere}
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        save_model(model, tmp_path / "model")


def test_models_that_are_not_what_they_say(model, tmp_path):
    filled(tmp_path / "run", [1.0])
    with pytest.raises(UserError, match="says nothing about its model"):
        load(tmp_path / "run")
    values = run_state(model, 1)
    del values["params.final_norm.scale"]
    with Store(tmp_path / "part") as store:
        store.save(1, values, {"model": model_meta(model)})
    with pytest.raises(UserError, match=r"does not hold the parameters of its own config: 1 missing: final_norm.scale"):
        load(tmp_path / "part")
    (tmp_path / "runs" / "2024").mkdir(parents=True)
    with pytest.raises(UserError, match="is no checkpoint"):
        load(tmp_path / "runs")


def test_the_config_survives_as_json(model):
    meta = json.loads(json.dumps(model_meta(model)))
    assert config_of(meta) == model.cfg
    assert (meta["dtype"], meta["compute_dtype"], meta["quant"]) == ("bfloat16", "bfloat16", {})
    meta["config"]["hidden_layers"] = 3
    with pytest.raises(UserError, match="has hidden_layers, which this version does not know"):
        config_of(meta)
    with pytest.raises(UserError, match="model config cannot be read"):
        config_of({"config": {"hidden_size": 3}})


def test_unusable_directories(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "file" / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's writer says it too
def test_a_full_disk_is_an_error_and_the_step_before_stays(tmp_path):
    """A limit on the size of files stands for it: the system refuses to write on, in the middle of the background write."""
    state = {
        "params.own.w": jax.random.normal(jax.random.key(0), (256, 1024))
    }  # more than what pytest keeps of the output
    with Store(tmp_path / "run") as store:
        store.save(1, state, {"data": {}})
        store.wait()
        assert "committed step 1" in (store.committed() or "")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
        try:
            with pytest.raises(
                UserError, match=r"Step 2 could not be saved .*File too large.* step 1 is the newest that is"
            ):
                said_of(store, 2, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert store.steps() == [1]
        same(store.restore(1, state)[0], state)
        store.save(3, state, {"data": {}})  # there is room again
        store.wait()
        assert store.steps() == [1, 3]


@contextmanager
def read_only(directory):
    """For root too, whom permissions do not stop."""
    directory.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o755)


def test_a_directory_that_takes_no_files_is_an_error_at_once(tmp_path):
    for parent in (tmp_path, *tmp_path.parents):  # so that another user may look inside
        if parent.is_relative_to(tmp_path.parents[2]):
            parent.chmod(0o755)
    with Store(tmp_path / "run") as store:
        store.save(1, big_state(1), {"data": {}})
        store.wait()
        with (
            read_only(tmp_path / "run"),
            pytest.raises(UserError, match=r"Step 2 .*takes no files.* step 1 is the newest"),
        ):
            said_of(store, 2, big_state(2))
        assert store.steps() == [1]
        same(store.restore(1, big_state(1))[0], big_state(1))


def said_of(store: Store, step: int, state: dict[str, jax.Array]) -> None:
    """Saves a step and asks about it until it is committed or has failed, as the training loop does."""
    store.save(step, state, {"data": {}})
    while (line := store.committed()) is None:
        time.sleep(0.01)
    raise AssertionError(line)


def same(got, wanted) -> None:
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_orbax_keeps_quiet(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        filled(tmp_path / "run", [1.0, None], metric="loss")
    assert not [record for record in caplog.records if "orbax" in record.pathname]


def test_a_model_trained_on_a_grid_comes_back_with_it(model, tmp_path):
    quantised = apply(model, QuantConfig(grid="int4_sym7_g32", cover=("ffw", "embedding")))
    save_model(quantised, tmp_path / "model")
    loaded = load(tmp_path / "model")
    stacks = ("own.full", "own.sliding")
    paths = {f"{stack}.mlp.{name}" for stack in stacks for name in ("gate", "up", "down")} | {"embed"}
    assert grid_names(loaded) == dict.fromkeys(paths, "int4_sym7_g32")
    assert same_arrays(loaded, model)  # the float weights: training goes on from them
    assert grid_names(model) == {}


def flipped(path, at: int) -> None:
    """The file with one bit changed."""
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def big_state(step: int) -> dict[str, jax.Array]:
    """A state whose arrays do not compress to nothing."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "params.own.w": jax.random.normal(key, (64, 32), jnp.bfloat16),
        "opt.mu.own.w": jax.random.normal(key, (64, 32), jnp.float32),
    }


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sealed") / "run"
    with Store(directory) as store:
        store.save(5, big_state(5), {"data": {}})
    return directory


def test_any_flipped_bit_is_found_and_named(sealed, tmp_path):
    files = sorted(path for path in (sealed / "5" / "state").rglob("d/*"))
    sizes = np.array([path.stat().st_size for path in files])
    generator = np.random.default_rng(0)
    arrays_named = 0
    for number in range(12):
        path = files[generator.choice(len(files), p=sizes / sizes.sum())]
        copy = tmp_path / f"copy{number}"
        shutil.copytree(sealed, copy)
        flipped(copy / path.relative_to(sealed), int(generator.integers(8 * path.stat().st_size)))
        with Store(copy) as store, pytest.raises(UserError, match=f"damaged.*{path.name}") as caught:
            store.restore(5, big_state(5))
        arrays_named += any(name in str(caught.value) for name in ("params.own.w", "opt.mu.own.w", "arrays: step"))
    assert arrays_named >= 8  # a flip beside the arrays changes none of them, and the sentence says so


def test_arrays_are_compared_even_when_the_files_digests_are_gone(sealed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sealed, copy)
    (copy / "5" / "digests.json").unlink()
    with Store(copy) as store:
        store.restore(5, big_state(5))
    largest = max((copy / "5" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    flipped(largest, 4 * largest.stat().st_size)
    with (
        Store(copy) as store,
        pytest.raises(UserError, match=r"damaged .*every file with a digest is as it was.*own\.w"),
    ):
        store.restore(5, big_state(5))


def test_missing_extra_and_swapped_files_are_named(sealed, tmp_path):
    files = sorted((sealed / "5" / "state").rglob("d/*"), key=lambda path: -path.stat().st_size)
    one, other = (path.relative_to(sealed) for path in files[:2])
    for name, spoil in {
        "missing": lambda root: (root / one).unlink(),
        "bytes and had": lambda root: (root / one).write_bytes((root / one).read_bytes()[:-1]),
        "does not belong": lambda root: (root / one).with_name("stranger").write_bytes(b"x"),
        "not what was written|bytes and had": lambda root: (
            (root / "swap").write_bytes((root / one).read_bytes()),
            (root / one).write_bytes((root / other).read_bytes()),
            (root / "swap").replace(root / other),
        ),
    }.items():
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(sealed, copy)
        spoil(copy)
        with Store(copy) as store, pytest.raises(UserError, match=name):
            store.restore(5, big_state(5))


def test_digest_is_the_same_on_any_mesh_and_changes_with_any_element():
    mesh = jax.make_mesh((8,), ("x",))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32, jnp.bool_):
        x = (100 * jax.random.normal(jax.random.key(0), (16, 24))).astype(dtype)
        split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
        one = digests({"x": x})["x"]
        assert one == digests({"x": split})["x"]
        changed = np.asarray(x).copy()
        changed[7, 3] = not changed[7, 3] if dtype == jnp.bool_ else changed[7, 3] + 1
        assert digests({"x": jnp.asarray(changed)})["x"] != one
    assert digests({"x": jnp.asarray([1.0, 2.0])}) != digests({"x": jnp.asarray([2.0, 1.0])})


def test_a_models_parameter_with_a_changed_bit_is_refused(model, tmp_path):
    save_model(model, tmp_path / "model")
    load_model(tmp_path / "model", dtype="bfloat16")
    largest = max((tmp_path / "model" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    flipped(largest, 4 * largest.stat().st_size)
    with pytest.raises(UserError, match=f"damaged .*{largest.name} is not what was written; arrays: params"):
        load_model(tmp_path / "model", dtype="bfloat16")

"""Orbax directories: the checkpoints of a training run (asynchronous, atomic, keep-N and best-N), and models.

A step holds a flat dict of arrays by dotted name (`params.*`, `frozen.*`, `opt.*`, ...) and a JSON `meta`; a model directory
is such a step with `params.*` only, so everything that reads a model reads a training run too.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from gemma4_jax import config_media
from gemma4_jax.checkpoint.digest import FILES, digests, write_file_digests
from gemma4_jax.checkpoint.mismatch import Mismatch, listed
from gemma4_jax.checkpoint.names_towers import is_tower
from gemma4_jax.checkpoint.placement import Shardings, Which, default_device, dtype_name
from gemma4_jax.checkpoint.source import Source, grids_of, of_store
from gemma4_jax.checkpoint.steps import (
    FORMAT,
    absolute,
    best_step,
    committed_steps,
    form_of,
    rank,
    read_arrays,
    read_record,
    saved_forms,
    step_directory,
)
from gemma4_jax.checkpoint.verified import read_as, read_verified, refuse_damaged_arrays, refuse_damaged_files
from gemma4_jax.config import ModelConfig, Rope
from gemma4_jax.config_media import AudioConfig, VisionConfig
from gemma4_jax.errors import UserError
from gemma4_jax.model.parameters import arrays, is_trainable, variables, with_arrays
from gemma4_jax.model.transformer import Transformer, abstract
from gemma4_jax.quant.policy import described, restored

CHUNK = 64 << 20
"""Bytes of a piece of a large array on disk."""

PARAMETERS = ("params.", "frozen.")
"""Prefixes of the arrays that are the model: those that training moves and those it does not."""


class Store:
    """The checkpoints of one training run: `directory/STEP/{state,meta}`.

    Saving returns as soon as the arrays are copied off the devices; a step counts when it is committed to disk. Errors of
    the background write are raised by the next `save`, `wait` or `close`. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        save_every: int = 1,
    ):
        """Opens or creates the directory; what killed runs left half-written in it is removed before the first save.

        Args:
          directory: of this run's steps.
          keep: newest steps that stay.
          metric: name in `save`'s metrics by which steps are ranked; None: only the newest stay.
          mode: whether the smallest or the largest value is best. NaN is never best.
          keep_best: best steps that stay beside the newest.
          save_every: `save` without `force` skips steps that are no multiple of it.
        """
        self.directory = absolute(directory)
        self.metric, self.mode, self.save_every = metric, mode, save_every
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if metric is not None:
            best = policies.BestN(
                get_metric_fn=self._rank, reverse=False, n=keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=None if metric is None else self._rank,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._writing: int | None = None
        self._began = self._bytes = 0.0
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(f"The checkpoint directory {self.directory} cannot be used: {error}.") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts writing a step; False where `save_every` skips it or it is there already.

        Args:
          step: optimizer steps done.
          arrays: flat dict by dotted name; may be donated as soon as this returns.
          meta: JSON values: `model_meta(model)` under "model", where the data stands, ...
          metrics: numbers of this step; the one the store ranks by, if present, makes it eligible for best.
          force: save whatever `save_every` says.

        Raises:
          UserError: the directory holds later steps, or the background write of an earlier step failed.
        """
        newest = self._manager.latest_step()
        if newest is not None and step < newest:
            raise UserError(
                f"{self.directory} already holds step {newest}, so step {step} cannot be saved; resume from there or choose "
                "another directory."
            )
        due = force or step % self.save_every == 0 or self._manager.reached_preemption(step)
        if step == newest or not due:
            return False
        ranked = self.metric is not None and metrics is not None and self.metric in metrics
        record = {
            "format": FORMAT,
            "meta": dict(meta),
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
            "ranked_by": [self.metric, self.mode] if ranked else None,
            "digests": digests(arrays),
        }
        state = ocp.args.PyTreeSave(dict(arrays), save_args=in_chunks(arrays))
        items = ocp.args.Composite(state=state, meta=ocp.args.JsonSave(record))
        scores = {self.metric: record["metrics"][self.metric]} if ranked else None
        self.wait()
        self._check_writable(step)
        with self._saying_what_failed(step):
            self._writing, self._began = step, time.monotonic()
            return self._manager.save(step, args=items, metrics=scores, force=True)

    def steps(self) -> list[int]:
        """Every committed step in order."""
        return committed_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step; a step still being written does not count."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The committed step with the best value of the metric; None when no step has one."""
        return best_step(self.directory)

    def restore(
        self, step: int, like: Mapping[str, Any], *, verify: bool = True
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The arrays and the meta of a committed step.

        Args:
          step: from `latest` or `best`.
          like: what every array must be: ShapeDtypeStructs (with sharding) or arrays, under exactly the saved names.
          verify: compare what was read with the digests taken when it was saved.

        Raises:
          UserError: no such step; other names, shapes or dtypes (listed); damaged files.
        """
        if step not in self.steps():
            have = listed(map(str, self.steps()))
            raise UserError(f"{self.directory} has no step {step}; committed steps: {have or 'none'}.")
        directory = self.directory / str(step)
        if verify:
            refuse_damaged_files(directory)
        saved = saved_forms(directory)
        wanted = {name: form_of(value) for name, value in like.items()}
        wrong = Mismatch.between(wanted, saved)
        if wrong:
            raise UserError(f"{directory} is a checkpoint of another model, optimizer or dtype: {wrong}.")
        record = read_record(directory)
        if not verify:
            return read_arrays(directory, dict(like)), record["meta"]
        return read_verified(directory, dict(like), record.get("digests") or {}), record["meta"]

    def set_aside(self, steps: Sequence[int]) -> Path:
        """Moves damaged steps out of the way of those that will be saved; where they are now. On all processes at once."""
        aside = Path(self.directory).with_name(f"{self.directory.name}_damaged")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                Path(self.directory / str(step)).rename(aside / f"{step}-{time.strftime('%Y%m%dT%H%M%S')}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged steps are set aside")
        self._manager.reload()
        return aside

    def _seal(self) -> None:
        """Digests of the files of the step being written: they are all there, and the step has no name yet."""
        for path in self.directory.iterdir():
            if path.name.split(".")[0] == str(self._writing) and not (path / FILES).exists():
                self._bytes = write_file_digests(path)

    def committed(self) -> str | None:
        """Once for every save that has ended since the last call: which step is safe now, its size, and how long it took.

        Raises UserError where it has failed.
        """
        step = self._writing
        with self._saying_what_failed(step):
            if step is None or self._manager.is_saving_in_progress():
                return None
            self._writing = None
            self._manager.wait_until_finished()  # a save that failed early is over too, and says so only here
        seconds = time.monotonic() - self._began
        return f"committed step {step}: {self._bytes / 1e9:.3g} GB with digests, {seconds:.1f} s after it was begun"

    def wait(self) -> None:
        """Returns when every started save is committed; UserError where one has failed."""
        with self._saying_what_failed(self._writing):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self.wait()
        self._manager.close()

    @contextmanager
    def _saying_what_failed(self, step: int | None) -> Iterator[None]:
        """Errors of writing as UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if (reason := system_error(error)) is None:
                raise
            raise self._failed(step, reason) from error

    def _check_writable(self, step: int) -> None:
        """UserError for a directory that takes no files. Orbax would find out too, and wait five minutes for itself at exit."""
        path = os.fspath(self.directory)
        effective = os.access in os.supports_effective_ids
        if "://" not in path and not os.access(path, os.W_OK | os.X_OK, effective_ids=effective):
            raise self._failed(step, "the directory is not there or takes no files")

    def _failed(self, step: int | None, reason: str) -> UserError:
        newest = self.latest() if self.directory.exists() else None
        whole = "there is no whole step" if newest is None else f"step {newest} is the newest that is whole"
        return UserError(
            f"Step {step} could not be saved in {self.directory} ({reason}); {whole}. Make room or give the directory back, and "
            "run the same command: it goes on from there."
        )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        """A number that is larger for better steps."""
        return rank(metrics[self.metric or ""], self.mode)


def in_chunks(arrays: Mapping[str, jax.Array]) -> dict[str, ocp.SaveArgs]:
    """How Orbax cuts each array on disk: who exports reads layer by layer, of a table some rows, and a chunk is read whole."""
    found = {}
    for name, value in arrays.items():
        layers = (0,) if value.ndim > 2 else ()
        large = value.nbytes > CHUNK
        found[name] = ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=layers) if large else ocp.SaveArgs()
    return found


def system_error(error: Exception) -> str | None:
    """What the operating system said: of an OSError, or of TensorStore's ValueError, which carries the number; None of others."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return None if number is None else os.strerror(int(number[1]))


def save_model(model: Transformer, path: str | os.PathLike[str]) -> None:
    """Writes a model directory, complete or not at all."""
    state = {f"params.{name}": value for name, value in arrays(model).items()}
    write_model(path, model_meta(model), state, lambda: digests(state), save_args=in_chunks(state))


def write_model(
    path: str | os.PathLike[str],
    meta: Mapping[str, Any],
    state: Mapping[str, Any],
    digest: Callable[[], dict[str, str]],
    handler: ocp.PyTreeCheckpointHandler | None = None,
    **options: Any,
) -> None:
    """A model directory of what `handler` knows to write; `meta` is `model_meta`, `digest` gives those of `state`."""
    directory = absolute(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory; choose another one or remove it.")
    record = {"format": FORMAT, "meta": {"model": meta}, "metrics": None, "ranked_by": None, "digests": digest()}
    saved = ocp.args.PyTreeSave(dict(state), **options)
    items = ocp.args.Composite(state=saved, meta=ocp.args.JsonSave(record))
    handlers: dict[str, Any] = {"state": handler or ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            checkpointer.save(directory, args=items, force=directory.exists())
        if jax.process_index() == 0:
            write_file_digests(directory)
    except (OSError, ValueError) as error:
        if (reason := system_error(error)) is None:
            raise
        raise UserError(f"{directory} cannot be written: {reason}.") from error


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    text_only: bool = False,
    shardings: Shardings = default_device,
    step: Which = "latest",
    verify: bool = True,
    base: str | os.PathLike[str] | None = None,
    merge: bool = True,
) -> Transformer:
    """The model of a model directory, of a training step, or of a run; optimizer state is not read.

    A model that was trained on a grid comes back with it: its weights are rounded where they are used, as in training.

    Args:
      path: one of these directories.
      dtype: of the parameters; None: as stored.
      compute_dtype: what layers compute in; None: `dtype`, else as the saved model.
      text_only: leave out the towers.
      shardings: where each parameter goes.
      step: of a run: a number, "latest" or "best".
      verify: compare every parameter with the digest taken when it was saved.
      base, merge: of steps that hold adapters, see `load`.
    """
    dtype, compute_dtype = dtype_name(dtype), dtype_name(compute_dtype)
    directory = step_directory(path, step)
    meta = read_model_meta(directory)
    if "lora" in meta:
        from gemma4_jax.checkpoint.adapters import load_adapted

        form: dict[str, Any] = {"dtype": dtype, "compute_dtype": compute_dtype, "shardings": shardings}
        return load_adapted(directory, meta, base=base, merge=merge, verify=verify, **form)
    cfg = config_of(meta)
    cfg = cfg.text_only() if text_only else cfg
    model = abstract(cfg, dtype or meta["dtype"], compute_dtype=compute_dtype or dtype or meta["compute_dtype"])
    model = restored(model, meta["quant"])
    saved = {name: form for name, form in saved_forms(directory).items() if name.startswith(PARAMETERS)}
    stored_as = {name.split(".", 1)[1]: name for name in saved}
    forms = {short: saved[name] for short, name in stored_as.items() if not (text_only and is_tower(short))}
    like = {}
    for name, variable in variables(model).items():
        shape = variable.get_value().shape
        kept = forms[name].dtype if name in forms else meta["dtype"]
        wanted = kept if getattr(variable, "exact", False) else dtype or kept
        like[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(wanted), sharding=shardings(name, variable))
    wrong = Mismatch.between({n: s.shape for n, s in like.items()}, {n: form.shape for n, form in forms.items()})
    if wrong:
        raise UserError(f"{directory} does not hold the parameters of its own config: {wrong}.")
    asked = {stored_as[name]: value for name, value in like.items()}
    values = read_as(directory, asked) if verify else read_arrays(directory, asked)
    return with_arrays(model, {name: values[stored_as[name]] for name in like})


def model_source(path: str | os.PathLike[str], step: Which = "latest") -> Source:
    """The model that `load_model` would load, read tensor by tensor; each is compared with its digest first."""
    directory = step_directory(path, step)
    meta = read_model_meta(directory)
    cfg = config_of(meta)
    saved = saved_forms(directory)
    stored = {name.split(".", 1)[1]: name for name in saved if name.startswith(PARAMETERS)}
    model = restored(abstract(cfg), meta["quant"])
    wanted = {name: variable.get_value().shape for name, variable in variables(model).items()}
    wrong = Mismatch.between(wanted, {name: saved[full].shape for name, full in stored.items()})
    if wrong:
        raise UserError(f"{directory} does not hold the parameters of its own config: {wrong}.")
    refuse_damaged_arrays(directory, stored.values())
    return of_store(directory, cfg, stored, grids_of(model))


def model_meta(model: Transformer) -> dict[str, Any]:
    """What a checkpoint says about its model, as JSON: config, dtypes, and how it is quantised (`policy.described`)."""
    kept = variables(model)
    dtype = next(v.get_value().dtype for v in kept.values() if is_trainable(v) and not getattr(v, "exact", False))
    config = dataclasses.asdict(model.cfg)
    return {"config": config, "dtype": dtype.name, "compute_dtype": model.compute_dtype, "quant": described(model)}


def config_of(meta: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig in a `model_meta`."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    try:
        saved = dict(meta["config"])
        unknown = saved.keys() - fields
        if unknown:
            raise UserError(
                f"The checkpoint's config has {listed(sorted(unknown))}, which this version does not know; a newer one wrote it."
            )
        ropes = {name: Rope(**saved[name]) for name in ("rope_sliding", "rope_full") if name in saved}
        towers = {
            "vision": config_media.of_json(VisionConfig, saved.get("vision")),
            "audio": config_media.of_json(AudioConfig, saved.get("audio")),
        }
        return ModelConfig(**{**saved, **ropes, **towers})
    except (TypeError, KeyError) as error:
        raise UserError(f"The checkpoint's model config cannot be read: {error}.") from error


def read_model_meta(path: str | os.PathLike[str], step: Which = "latest") -> dict[str, Any]:
    """`model_meta` of a model directory, a step, or a run."""
    directory = step_directory(path, step)
    meta = read_record(directory)["meta"].get("model")
    if not isinstance(meta, dict):
        raise UserError(
            f"{directory} says nothing about its model; it was not written by this project's training or convert."
        )
    return meta

"""`task=sft` and `task=qat`: one program; QAT adds grids on the weights and a teacher in the loss."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma4_jax.checkpoint.steps import absolute, committed_steps
from gemma4_jax.checkpoint.store import Store, model_meta
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.pipeline import DataConfig, Loader, make_loader
from gemma4_jax.errors import UserError
from gemma4_jax.eval.perplexity import evaluate_loss
from gemma4_jax.mesh_choice import training_mesh
from gemma4_jax.model.parameters import map_arrays
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.plan import report
from gemma4_jax.processor import Processor
from gemma4_jax.quant import policy
from gemma4_jax.quant.activations import scales
from gemma4_jax.sharding import batch_share, check_batch, media_multiple, parameter_shardings, shape_of
from gemma4_jax.train.calibration import calibrate
from gemma4_jax.train.loop import Hooks, resume, train
from gemma4_jax.train.metrics import Meter, duration, si
from gemma4_jax.train.optimizer import optimizer, schedule
from gemma4_jax.train.parts import coverage
from gemma4_jax.train.recorder import Recorder
from gemma4_jax.train.state import TrainState
from gemma4_jax.train.step import TrainStep, make_train_step
from gemma4_jax.train.teaching import Taught
from gemma4_jax.train.throughput import flops_per_token, forward_flops, peak_flops
from gemma4_jax.train.tracing import Tracer
from launch import schema, watching
from launch.adapting import Adapting, load_base, with_adapters
from launch.distilling import Teaching, teaching
from launch.models import check_agreement, make_processor, model_config
from launch.preflight import frozen, preflight
from launch.processes import devices, on, voice
from launch.settings import QatRun, TrainRun


def run_training(run: TrainRun, write: Callable[[str], None] = print) -> TrainState:
    """Trains, or goes on where the working directory stopped; returns the last state."""
    started = time.perf_counter()
    watching.check(run)
    if run.train.keep_best and run.eval_data is None:
        raise UserError("train.keep_best ranks checkpoints by held-out loss, but config.eval_data is none; set it.")
    cfg = model_config(run.model)
    write = voice(write)
    mesh = _mesh(run, cfg)
    if mesh is not None:
        write(f"mesh {shape_of(mesh)}: {mesh.size} devices, {jax.process_count()} processes")
    preflight(run, cfg, mesh)
    with on(mesh):
        return _train(run, cfg, mesh, started, write)


def _mesh(run: TrainRun, cfg: ModelConfig) -> Mesh | None:
    """The mesh of the settings, or the one that suits them; None on one device."""
    rows, rest = divmod(run.data.batch_size, run.train.grad_accum)
    if rest:
        raise UserError(
            f"train.grad_accum={run.train.grad_accum} does not divide data.batch_size={run.data.batch_size}; choose one "
            "that does."
        )
    mesh = training_mesh(cfg, run.mesh, devices(run.mesh), rows, run.data.seq_len)
    if run.eval_data is not None:
        check_batch(mesh, run.eval_data.batch_size, run.eval_data.seq_len, "eval_data")
    return mesh


def _train(
    run: TrainRun, cfg: ModelConfig, mesh: Mesh | None, started: float, write: Callable[[str], None]
) -> TrainState:
    processor = make_processor(run.tokenizer, run.model, cfg, run.media)
    check_agreement(cfg, processor, run.data, run.eval_data)
    workdir = None if run.workdir is None else Path(run.workdir)
    resumes = workdir is not None and bool(committed_steps(absolute(workdir / "checkpoints")))
    loader, evaluate = _data(run, processor, mesh, write)
    state, template, adapting, taught = _start(run, processor, mesh, loader, resumes, write)
    sizes = [sum(x.size for x in group.values()) for group in (state.params, {**state.frozen, **state.base})]
    write(
        f"training {si(sizes[0])} parameters, {si(sizes[1])} stay as they are; ready in {duration(time.perf_counter() - started)}"
    )
    store = None if workdir is None else _store(run, workdir, processor, template, mesh)
    batches = loader if taught.answers is None else Taught(loader, taught.answers)
    state = resume(store, state, batches, verify=run.train.verify, fall_back=run.train.fall_back, write=write)
    done = int(state.step)
    if done:
        write(f"resumed after step {done} of {run.train.steps}")
    speaks = jax.process_index() == 0
    recorder = Recorder(workdir, done, run.track, schema.to_mapping(run), speaks=speaks, begun=started)
    tracer = Tracer(run.profile, workdir, write) if speaks else None
    per_token, peak = _model_flops(run, cfg, state, taught.teacher), peak_flops(1 if mesh is None else mesh.size)
    try:
        state = train(
            run.train,
            state=state,
            template=template,
            step=_step(run, template),
            learning_rate=schedule(run.optim, run.train.steps),
            batches=batches,
            teacher=taught.teacher,
            store=store,
            meta={"model": model_meta(template) | (adapting.described(template) if adapting else {})},
            recorder=recorder,
            meter=Meter(run.train.steps, per_token, peak, started),
            hooks=Hooks(evaluate, watching.samples(run, cfg, processor), write, tracer),
        )
    finally:
        recorder.close()
        loader.close()
        if store is not None:
            store.close()
    where = "" if workdir is None else f"; committed in {workdir / 'checkpoints'}"
    write(f"done: {run.train.steps} steps in {duration(time.perf_counter() - started)}{where}")
    return state


def _data(
    run: TrainRun, processor: Processor, mesh: Mesh | None, write: Callable[[str], None]
) -> tuple[Loader, Callable[[Transformer], dict[str, float]] | None]:
    """The training rows, and what evaluates a model on the held-out ones, where there are any."""
    share, multiple_of = batch_share(mesh), media_multiple(mesh)
    quarantine = None if run.workdir is None or jax.process_index() > 0 else Path(run.workdir) / "bad_rows.jsonl"
    loader = _loader(
        run.data, processor, share, quarantine=quarantine, parts=run.train.grad_accum, multiple_of=multiple_of
    )
    write(f"data\n{loader.summary.table()}")
    return loader, None if run.eval_data is None else _evaluation(run, processor, share, multiple_of, write)


def _start(
    run: TrainRun,
    processor: Processor,
    mesh: Mesh | None,
    loader: Loader,
    resumes: bool,
    write: Callable[[str], None],
) -> tuple[TrainState, Transformer, Adapting | None, Teaching]:
    """The state before step 1, the structure of its model, what is known of adapters, and the teacher.

    The state alone holds the weights then: a second set would double the memory of the run.
    """
    model, adapting = load_base(run, mesh, write)
    if adapting is not None and run.workdir is not None and resumes:
        adapting.check(Path(run.workdir))
    taught = teaching(run, model, processor, mesh, loader, write, resumes=resumes)
    student = with_adapters(run, model, write)
    if isinstance(run, QatRun):
        student = _quantised(run, student, mesh, None if resumes else loader, write)
    elif policy.grid_names(model):
        write(f"weights on the grid\n{policy.coverage(model).table()}")
    optim = optimizer(run.optim, run.train.steps)
    state = TrainState.create(student, optim, frozen(run, student), copy=taught.shares_arrays)
    if student.cfg.is_multimodal:
        write(f"parts of the model (optim.train={','.join(run.optim.train)})\n{coverage(state.params, state.frozen)}")
    return state, jax.eval_shape(lambda m: m, student), adapting, taught


def _store(run: TrainRun, workdir: Path, processor: Processor, template: Transformer, mesh: Mesh | None) -> Store:
    """The checkpoints of the run, with what lies beside them: the tokenizer, and how parameters are cut."""
    store = Store(workdir / "checkpoints", keep=run.train.keep, metric="loss" if run.train.keep_best else None)
    if jax.process_index() == 0:
        processor.save(workdir)
        if mesh is not None:
            (workdir / "parameters.txt").write_text(report.parameters(template, mesh) + "\n")
    return store


def _step(run: TrainRun, template: Transformer) -> TrainStep:
    return make_train_step(
        template,
        optimizer(run.optim, run.train.steps),
        grad_accum=run.train.grad_accum,
        remat=run.train.remat,
        balance_weight=run.train.balance_weight,
        skip_above=run.train.skip_above,
        distill_weight=run.quant.distill_weight if isinstance(run, QatRun) else 0.0,
        reverse_kl=run.quant.reverse_kl if isinstance(run, QatRun) else False,
    )


def _model_flops(run: TrainRun, cfg: ModelConfig, state: TrainState, teacher: Transformer | None) -> float:
    """Of one token, with the teacher's forward pass if there is one."""
    trained = {name: x.size for name, x in state.params.items()}
    taught = 0.0 if teacher is None else forward_flops(teacher.cfg, run.data.seq_len / 2)
    return flops_per_token(cfg, run.data.seq_len, trained) + taught


def _quantised(
    run: QatRun, model: Transformer, mesh: Mesh | None, batches: Loader | None, write: Callable[[str], None]
) -> Transformer:
    """The model of the policy, reported, its static activations calibrated from the first of `batches`, which are then as new.

    Without batches nothing is calibrated: the scales will come from the checkpoint that training goes on from.
    """
    quantised = policy.apply(model, run.quant)
    if mesh is not None:  # its new scales are where nothing was said
        place = parameter_shardings(mesh)
        quantised = map_arrays(lambda name, v: jax.device_put(v.get_value(), place(name, v)), quantised)
    activations, kv_cache = run.quant.rounds
    write(f"weights on the grid\n{policy.coverage(quantised, run.quant.stays).table()}")
    write(f"activations {activations}, keys and values {kv_cache}, gradient {run.quant.gradient}")
    if batches is not None and scales(quantised):
        began, start = time.perf_counter(), batches.state()
        quantised = calibrate(quantised, batches, run.quant.calibration_batches, remat=run.train.remat)
        batches.restore(start)
        write(
            f"calibrated {len(scales(quantised))} scales from {run.quant.calibration_batches} batches in "
            f"{duration(time.perf_counter() - began)}"
        )
    return quantised


def _loader(config: DataConfig, processor: Processor, share: tuple[int, int], **options: Any) -> Loader:
    return make_loader(config, processor, process_index=share[0], process_count=share[1], **options)


def _evaluation(
    run: TrainRun, processor: Processor, share: tuple[int, int], multiple_of: int, write: Callable[[str], None]
) -> Callable[[Transformer], dict[str, float]]:
    assert run.eval_data is not None
    loader = _loader(run.eval_data, processor, share, multiple_of=multiple_of)
    write(f"held-out data\n{loader.summary.table()}")

    def evaluate(model: Transformer) -> dict[str, float]:
        loader.reset()
        return evaluate_loss(model, loader, max_batches=run.train.eval_batches)

    return evaluate

"""`task=eval` with `eval.against`: quantised checkpoints beside their float model, and beside that model only rounded."""

import dataclasses
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import jax

from gemma4_jax.data.pipeline import Loader, held_out
from gemma4_jax.errors import UserError
from gemma4_jax.eval import quality
from gemma4_jax.eval.quality import Quality
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.processor import Processor
from gemma4_jax.quant.policy import described, grid_names, restored, without
from gemma4_jax.train.calibration import calibrate
from launch.models import make_model
from launch.settings import EvalRun

Write = Callable[[str], None]
ExactMatch = Callable[[Transformer], float]


def run_comparison(
    run: EvalRun,
    processor: Processor,
    reference: Transformer,
    exact_match: ExactMatch | None,
    write: Write,
    *,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, float]:
    """Measures the reference, then for each checkpoint its grids on the reference's weights, and the checkpoint itself.

    Static scales of activations that rounding alone needs are found on the held-out rows themselves, which only favours it.

    Returns the numbers by "MODEL.METRIC"; writes quality.json and quality.svg into `run.workdir`.
    """
    with held_out(run.data, processor) as loader:
        write(f"held-out data\n{loader.summary.table()}")
        found = _measured(run, loader, without(reference), exact_match, write, mesh)
    write(quality.report(found))
    return _kept(run, found, write)


def _measured(
    run: EvalRun,
    loader: Loader,
    reference: Transformer,
    exact_match: ExactMatch | None,
    write: Write,
    mesh: jax.sharding.Mesh | None,
) -> list[Quality]:
    most = run.eval.max_examples
    batches = None if most is None else -(-most // run.data.batch_size)
    found: list[Quality] = []

    def measure(name: str, model: Transformer, rounded: str | None = None) -> None:
        loader.reset()
        values = quality.divergence(model, reference, islice(loader, batches))
        right = None if exact_match is None else exact_match(model)
        grids = ", ".join(sorted(set(grid_names(model).values()))) or model.compute_dtype
        numbers = (values["perplexity"], values["kl"], values["agreement"])
        found.append(Quality(name, grids, *numbers, right, rounded))
        write(f"{name}: perplexity {values['perplexity']:.4f}, KL {values['kl']:.5f}")

    measure("float", reference)
    for name, path in run.eval.against.items():
        trained = make_model(dataclasses.replace(run.model, path=path, variant=None, overrides={}), run.seed, mesh)
        if trained.cfg != reference.cfg:
            raise UserError(
                f"eval.against.{name}: {path} holds another model than config.model.path; compare like with like."
            )
        kept = {part: value for part, value in described(trained).items() if part != "learned"}
        if kept:
            measure(f"{name} rounded", _only_rounded(loader, reference, kept))
        measure(name, trained, f"{name} rounded" if kept else None)
    return found


def _only_rounded(loader: Loader, reference: Transformer, description: dict) -> Transformer:
    loader.reset()
    batches = sum(1 for _ in loader)
    loader.reset()
    return calibrate(restored(reference, description), loader, min(batches, 16))


def _kept(run: EvalRun, found: list[Quality], write: Write) -> dict[str, float]:
    won = quality.recovered(found)
    results = {f"{name}.recovered": share for name, share in won.items()}
    for one in found:
        numbers = {
            "perplexity": one.perplexity,
            "kl": one.kl,
            "agreement": one.agreement,
            "exact_match": one.exact_match,
        }
        results |= {f"{one.name}.{metric}": value for metric, value in numbers.items() if value is not None}
    if run.workdir is not None:
        where = Path(run.workdir)
        where.mkdir(parents=True, exist_ok=True)
        (where / "quality.json").write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
        written = [where / "quality.json"]
        if won:
            try:
                quality.plot(found, str(where / "quality.svg"))
                written.append(where / "quality.svg")
            except ImportError:
                write("no plot: matplotlib is not installed; pip install matplotlib")
        write("\n".join(f"wrote {path}" for path in written))
    return results

"""`task=eval` with `eval.against`: quantised checkpoints beside their float model, and beside that model only rounded."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import jax

from gemma4_jax.data.pipeline import Loader, make_loader
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
    with _rows(run, processor) as loader:
        write(f"held-out data\n{loader.summary.table()}")
    most, reference = run.eval.max_examples, without(reference)
    batches = None if most is None else -(-most // run.data.batch_size)
    found: list[Quality] = []

    def measure(name: str, model: Transformer, rounded: str | None = None) -> None:
        with _rows(run, processor) as loader:
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
            measure(f"{name} rounded", _only_rounded(run, processor, reference, kept))
        measure(name, trained, f"{name} rounded" if kept else None)
    write(quality.report(found))
    return _kept(run, found, write)


def _only_rounded(run: EvalRun, processor: Processor, reference: Transformer, description: dict) -> Transformer:
    with _rows(run, processor) as loader:
        batches = sum(1 for _ in loader)
    with _rows(run, processor) as loader:
        return calibrate(restored(reference, description), loader, min(batches, 16))


@contextmanager
def _rows(run: EvalRun, processor: Processor) -> Iterator[Loader]:
    """One pass over the held-out rows in file order."""
    loader = make_loader(dataclasses.replace(run.data, epochs=1, shuffle=False), processor)
    try:
        yield loader
    finally:
        loader.close()


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

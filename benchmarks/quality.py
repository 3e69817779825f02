"""What QAT wins back on real text.

    python -m benchmarks.quality [--policies q4_0 ...] [--steps N] [--extra N] [--rate LR] [--home DIR]

A tiny E2B learns grade-school problems (GSM8K in ../shared/data) from random weights. Then the same weights train on, once in
float, once for each policy with rounding, with the same steps, rows and learning rate; the teacher of those is the float model that
trained on. `task=eval` lays all of them beside that float model, and beside the same model only rounded. A stage that is there
already (`--home`) is not run again.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Trains, compares, and copies the report into results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["q4_0", "w4a16", "mobile"])
    parser.add_argument("--steps", type=int, default=800, help="of the first training")
    parser.add_argument("--extra", type=int, default=400, help="of each training after it")
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate of each training after the first")
    parser.add_argument("--home", type=Path, default=ROOT / "runs" / "quality")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(
            "benchmarks: the shared test data is not beside the project (../shared/data), so there is no real text."
        )
    commands = stages(options.home, options.policies, options.steps, options.extra, options.rate)
    for command in commands:
        print(" ".join(command), flush=True)
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)  # noqa: S603
    RESULTS.mkdir(exist_ok=True)
    for name in ("quality.json", "quality.svg"):
        shutil.copy(options.home / "report" / name, RESULTS / name)


def stages(home: Path, policies: list[str], steps: int, extra: int, rate: float) -> list[list[str]]:
    """The commands, one after the other."""
    data = [f"data.paths={DATA}/gsm8k_train.jsonl", "data.kind=qa", "data.seq_len=1024", "data.batch_size=2"]
    more = [f"optim.learning_rate={rate}", "optim.warmup_steps=10", f"train.steps={extra}", "data.seed=1"]
    quiet = ["eval_data=none", "train.eval_every=0", "train.log_every=50"]
    first = [*data, *quiet, f"workdir={home}/base", f"train.steps={steps}", f"train.save_every={steps}"]
    on = [*data, *quiet, *more, f"model.path={home}/base"]
    commands = [
        _command("tiny_sft", *first),
        _command("tiny_sft", *on, "model.variant=none", "model.overrides={}", f"workdir={home}/float"),
    ]
    for policy in policies:
        teacher = [f"quant.teacher={home}/float", "quant.distill_weight=0.5", f"workdir={home}/{policy}"]
        commands.append(_command(f"tiny_qat:{policy}", *on, *teacher))
    rows = [f"data.paths={DATA}/gsm8k_test.jsonl", *data[1:], "eval.metrics=perplexity", f"model.path={home}/float"]
    against = [f"eval.against.{policy}={home}/{policy}" for policy in policies]
    return [*commands, _command("tiny_eval", *rows, *against, f"workdir={home}/report")]


def _command(config: str, *options: str) -> list[str]:
    name, _, argument = config.partition(":")
    spec = f"configs/{name}.py" + f":{argument}" * bool(argument)
    return ["python", "-m", "launch.run", f"--config={spec}", *(f"--config.{option}" for option in options)]


if __name__ == "__main__":
    main()

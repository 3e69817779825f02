"""Steps at their real sizes, compiled for TPUs and GPUs that are not here: `python -m benchmarks.aot`.

Each row is one `task=plan` command in a process of its own, one after the other, some minutes each on two cores. What a row
found is kept in results/tpu_aot.json, and results/tpu_aot.md is the table of all of it; rows that are there are not
compiled again unless asked for. The peer's figures are MaxText 0.2.5, measured as its row says.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gemma4_jax.tables import percent

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant and the settings of `configs/plan.py` that differ; `peer` is MaxText's peak in GiB for the same job."""

    name: str
    variant: str
    options: tuple[str, ...]
    peer: float | None = None

    @property
    def command(self) -> str:
        """What a reader types to get the row."""
        return " ".join(
            (f"python -m launch.run --config=configs/plan.py:{self.variant}", *(f"--config.{o}" for o in self.options))
        )


def _sft(name: str, variant: str, topology: str, batch: int, *more: str) -> Row:
    return Row(name, variant, (f"plan.topology={topology}", f"plan.batch_size={batch}", "plan.seq_len=8192", *more))


def _cut(name: str, variant: str, layers: int, peer: float, *more: str) -> Row:
    options = ("plan.topology=v6e:4x4", "plan.batch_size=16", "plan.seq_len=4096")
    return Row(name, variant, (*options, f"model.overrides.num_hidden_layers={layers}", *more), peer)


def _lora(name: str, variant: str, topology: str, *more: str) -> Row:
    sizes = (f"plan.topology={topology}", "plan.batch_size=8", "plan.seq_len=4096")
    return Row(name, variant, (*sizes, "plan.step=lora", "model.param_dtype=bfloat16", *more))


ROWS = (
    _cut("31B, 6 layers", "31b", 6, 10.25),
    _cut("26B-A4B, 6 layers", "26b_a4b", 6, 10.08),
    _cut("26B-A4B, 6 layers, fsdp 16", "26b_a4b", 6, 10.08, "mesh.fsdp=16"),
    _cut("E2B, 10 layers", "e2b", 10, 7.45, "model.overrides.num_kv_shared_layers=5"),
    _sft("SFT E2B", "e2b", "v5e:4x4", 16),
    _sft("SFT E2B", "e2b", "v6e:2x4", 8),
    _sft("SFT E4B", "e4b", "v6e:4x4", 16),
    _sft("SFT 26B-A4B", "26b_a4b", "v6e:8x8", 64),
    _sft("SFT 26B-A4B", "26b_a4b", "v5p:4x4x4", 64),
    _sft("SFT 26B-A4B", "26b_a4b", "tpu7x:4x4x4", 512),
    _sft("SFT 31B", "31b", "v6e:8x8", 64),
    _sft("SFT 31B", "31b", "v5p:4x4x4", 64),
    _sft("SFT 31B", "31b", "tpu7x:4x4x4", 256),
    _sft("QAT E4B with its teacher", "e4b", "v6e:4x4", 16, "plan.step=qat"),
    _sft("QAT 26B-A4B with its teacher", "26b_a4b", "v6e:8x8", 64, "plan.step=qat"),
    _lora("LoRA E2B", "e2b", "v5e:2x2"),
    _lora("QLoRA E2B", "e2b", "v5e:2x2", "lora.base=w4a16"),
    Row(
        "prefill of 131,072, E4B",
        "e4b",
        ("plan.step=prefill", "plan.topology=v6e:2x4", "plan.batch_size=1", "plan.seq_len=131072"),
    ),
    Row(
        "prefill of 262,144, 31B",
        "31b",
        ("plan.step=prefill", "plan.topology=v6e:4x4", "plan.batch_size=1", "plan.seq_len=262144"),
    ),
    Row(
        "decode at 262,144, 31B",
        "31b",
        ("plan.step=decode", "plan.topology=v6e:2x4", "plan.batch_size=1", "plan.seq_len=262144"),
    ),
    Row(
        "decode at 8,192, E2B, one chip",
        "e2b",
        ("plan.step=decode", "plan.topology=v5e:1x1", "plan.batch_size=1", "plan.seq_len=8192"),
    ),
    _sft("SFT E4B", "e4b", "h100:8", 8),
    _sft("SFT 26B-A4B", "26b_a4b", "h100:8", 8, "plan.first_moment=bfloat16"),
    Row(
        "decode at 32,768, 31B",
        "31b",
        ("plan.step=decode", "plan.topology=h100:8", "plan.batch_size=8", "plan.seq_len=32768"),
    ),
)


def main() -> None:
    """Compiles what is missing, then writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name or command has this text")
    parser.add_argument("--again", action="store_true", help="compile rows that are there too")
    parser.add_argument("--table", action="store_true", help="compile nothing, only write the table")
    parser.add_argument("--timeout", type=int, default=3600, metavar="SECONDS", help="of one row")
    options = parser.parse_args()
    path = RESULTS / "tpu_aot.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for row in ROWS:
        wanted = options.only in f"{row.name} {row.command}" and not options.table
        if not wanted or (row.command in found and not options.again):
            continue
        print(f"{row.name}\n  {row.command}", flush=True)
        found[row.command] = compiled(row, options.timeout)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"  {_line(row, found[row.command])}", flush=True)
    (RESULTS / "tpu_aot.md").write_text(markdown(found))


def compiled(row: Row, timeout: int) -> dict:
    """What the row's command found; {"error": ...} if it failed."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "plan.json"
        command = [sys.executable, *row.command.split()[1:], f"--config.plan.output={output}"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout)  # noqa: S603
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout} s"}
        numbers = json.loads(output.read_text()) if output.exists() else {}
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return numbers | ({} if done.returncode == 0 else {"error": last[0] if last else f"exit {done.returncode}"})


def markdown(found: dict[str, dict]) -> str:
    """The table, with the command of every row under it."""
    head = (
        "job",
        "devices",
        "mesh",
        "GiB",
        "estimate",
        "of MaxText",
        "kernels",
        "model / executed",
        "bound",
        "MFU at most",
        "s",
    )
    lines = [
        "# Compiled for devices that are not here",
        "",
        "`python -m benchmarks.aot` compiles every row with the compiler of its devices ("
        + _versions()
        + "); see the commands below.",
        "bfloat16 compute, float32 weights and Adam unless the command says otherwise; GiB are the compiler's peak for one JAX",
        "device, `estimate` is `plan.mode=estimate`'s. `of MaxText` is that peak over MaxText 0.2.5's for the same model, chips,",
        "sequence and batch (jax 0.12.0.1, libtpu 0.0.50.1, v6e 4x4, its defaults, fsdp 16). `bound` is what the roofline says",
        "binds, `MFU at most` what it leaves with everything overlapped; `s` is tracing and compiling on two CPU cores, which",
        "other work shared. No row has a score matrix, the logits of all tokens, or a gathered table unless it says so.",
        "Rows are compiled again when they are asked for, so they stem from several versions; the constants of the estimate",
        "were fitted to these rows.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    rows = [row for row in ROWS if row.command in found]
    lines += ["| " + " | ".join(_cells(row, found[row.command])) + " |" for row in rows]
    lines += ["", "## Commands", ""]
    lines += [f"- {row.name}: `{row.command}`" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row, numbers: dict) -> tuple[str, ...]:
    where = next(option.split("=")[1] for option in row.options if option.startswith("plan.topology"))
    if "total" not in numbers:
        return (row.name, where, *[""] * 8, numbers.get("error", ""))
    mesh = " x ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items() if size > 1) or "one"
    total, faults = numbers["total"], numbers["faults"]
    kernels = sorted({_short(name) for name in numbers["kernels"]} - {""})
    return (
        row.name + "".join(f" **{fault}**" for fault in faults[:1]),
        where,
        mesh,
        f"{total / GiB:.2f}",
        f"{numbers['estimated'] / total - 1:+.0%}",
        f"{total / GiB / row.peer:.2f}" if row.peer else "",
        ", ".join(kernels),
        # A product with one row is no matmul to XLA, and not counted.
        f"{numbers['model_flops'] / numbers['flops']:.2f}" if numbers["model_flops"] <= 1.05 * numbers["flops"] else "",
        numbers["binding"],
        percent(numbers["mfu_bound"]),
        f"{numbers['compile_seconds']:.0f}",
    )


def _short(kernel: str) -> str:
    known = ("splash", "grouped_matmul", "grouped_outer", "sum_rows", "gemm", "triton")
    return next((name for name in known if name in kernel), "")


def _line(row: Row, numbers: dict) -> str:
    return " | ".join(_cells(row, numbers)[2:])


def _versions() -> str:
    from importlib.metadata import version

    return f"jax {version('jax')}, libtpu {version('libtpu')}"


if __name__ == "__main__":
    main()

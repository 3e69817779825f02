"""`task=convert`: a checkpoint of either kind becomes one of either kind."""

import time
from collections.abc import Callable
from pathlib import Path

from gemma4_jax.checkpoint.hf import save_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.errors import UserError
from gemma4_jax.processor import Processor
from gemma4_jax.quant import policy
from gemma4_jax.tokenizer import find_file
from gemma4_jax.train.metrics import duration, si
from launch.models import tokenizer_beside
from launch.settings import ConvertRun


def run_convert(run: ConvertRun, write: Callable[[str], None] = print) -> None:
    """Reads `convert.source`, writes `convert.target` in the other layout; the tokenizer goes along."""
    started = time.perf_counter()
    config = run.convert
    target = Path(config.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"convert.target {config.target!r} exists and is not an empty directory; choose another.")
    # A grid is applied to the weights as stored; writing casts them.
    dtype = config.dtype if config.format == "orbax" else None
    model = load(config.source, dtype=dtype, text_only=config.text_only)
    if config.format == "hf" and policy.grid_names(model):
        write("weights are written as the grid they were trained on rounds them")
    home = tokenizer_beside(config.source)
    processor = None if home is None else Processor.load(home)
    if processor is None:
        write(f"no tokenizer beside {config.source}; put one into {config.target} by hand")
    if config.format == "hf":
        options = (
            {}
            if home is None or processor is None
            else {"stop_ids": processor.stop_ids, "extra_files": [find_file(home)]}
        )
        save_hf(model, target, dtype=config.dtype, max_shard_size=config.max_shard_size, **options)
    else:
        save_model(model, target)
        if processor is not None:
            processor.save(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    write(f"wrote {config.target}: {config.format}, {si(size)}B in {duration(time.perf_counter() - started)}")

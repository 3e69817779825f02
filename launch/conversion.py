"""`task=convert`: a checkpoint of either kind becomes one of either kind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma4_jax.checkpoint.hf_export import write_hf
from gemma4_jax.checkpoint.load import load
from gemma4_jax.checkpoint.source import of_path
from gemma4_jax.checkpoint.store import save_model
from gemma4_jax.checkpoint.streamed import can_stream, save_source
from gemma4_jax.errors import UserError
from gemma4_jax.processor import Processor
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
    source = of_path(config.source, text_only=config.text_only)
    home = tokenizer_beside(config.source)
    processor = None if home is None else Processor.load(home)
    if processor is None:
        write(f"no tokenizer beside {config.source}; put one into {config.target} by hand")
    if config.format == "hf":
        options: dict[str, Any] = {"max_shard_size": config.max_shard_size}
        if home is not None and processor is not None:
            options |= {"stop_ids": processor.stop_ids, "extra_files": [find_file(home)]}
        if source.grids:
            write("weights are written as the grid they were trained on rounds them")
        write_hf(source, target, dtype=config.dtype, requantise=True, **options)
    else:
        if can_stream(source):
            save_source(source, target, dtype=config.dtype)
        else:
            del source
            save_model(load(config.source, dtype=config.dtype, text_only=config.text_only), target)
        if processor is not None:
            processor.save(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    write(f"wrote {config.target}: {config.format}, {si(size)}B in {duration(time.perf_counter() - started)}")

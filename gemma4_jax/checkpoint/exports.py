"""`export`: a checkpoint, or a model in memory, as files that other programs load, checked before a byte is written."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gemma4_jax.checkpoint import compressed_tensors, gguf, gguf_tokenizer, hf_export, manifest, mmproj, mobile
from gemma4_jax.checkpoint.canvas import refuse_existing
from gemma4_jax.checkpoint.export import Fate, Outcome
from gemma4_jax.checkpoint.hf import STOP_IDS
from gemma4_jax.checkpoint.placement import Which, dtype_name
from gemma4_jax.checkpoint.source import Source, of_model, of_path
from gemma4_jax.errors import UserError, did_you_mean
from gemma4_jax.model.transformer import Transformer
from gemma4_jax.quant import policy as policies
from gemma4_jax.tokenizer import Tokenizer, find_file

Format = Literal["hf", "gguf", "compressed-tensors", "mobile"]
FORMATS: tuple[str, ...] = get_args(Format)
_BESIDE = ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "tokenizer.model")
"""Files of a tokenizer that go along into a directory, where they exist."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written.

    path: file or directory. manifest: the JSON beside it. read_bytes: of the source, as stored. seconds: of reading, rounding
    and writing the tensors. towers: the file of vision and audio towers beside a GGUF file, if the model has some.
    """

    path: Path
    manifest: Path
    outcome: Outcome
    how: str
    activations: str
    towers: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of what was written."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def rows(self) -> list[tuple[str, str, int, int, float]]:
        """(grid, stored as, tensors, weights, relative error), the error over all weights of the row; largest row first."""
        groups: dict[tuple[str, str], list[Fate]] = {}
        for fate in self.outcome.fates:
            groups.setdefault((fate.grid or "float", fate.label), []).append(fate)
        rows = []
        for (grid, label), fates in groups.items():
            sizes = [int(np.prod(fate.shape, dtype=np.int64)) for fate in fates]
            error = sum(fate.error for fate in fates) / max(sum(fate.power for fate in fates), 1e-300)
            rows.append((grid, label, len(fates), sum(sizes), error**0.5))
        return sorted(rows, key=lambda row: -row[3])


def export(
    what: Transformer | Source | str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Format,
    dtype: str = "bfloat16",
    policy: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    requantise: bool = False,
    experts: compressed_tensors.Experts = "float",
    max_shard_size: str | int = "5GB",
    name: str | None = None,
    text_only: bool = False,
    step: Which = "latest",
    base: str | os.PathLike[str] | None = None,
) -> Report:
    """Writes `target` and a manifest; both appear whole or not at all. The model is read tensor by tensor, never held whole.

    Adapters are merged into their base first, which memory then holds whole; merged weights stay on the grid they were trained on.

    Args:
      what: a model, or whatever `load` reads.
      target: a new .gguf file, or for the other formats a new directory.
      format: "hf": float weights as their grids round them; "gguf", towers in a file of their own;
        "compressed-tensors": W4A16, W8A16; "mobile": E2B and E4B.
      dtype: of what is not written as codes: float32, bfloat16 or float16.
      policy: put a float checkpoint on a policy's grids now: post-training quantisation. None: the grids it was trained on.
      tokenizer: file or directory; "gguf" needs one. None: none is written.
      requantise: let the file hold other values than the model computes with (another grid than trained, a narrow dtype).
      experts: of "compressed-tensors", see `write_compressed_tensors`.
      max_shard_size: of safetensors files.
      name: of the model inside a GGUF file; None: that of the file.
      text_only: leave out vision and audio towers.
      step: of a training run.
      base: of adapters: where their base lies; None: where it lay in training.

    Raises:
      UserError: `target` exists, weights that are not finite or not on the lattice, a policy or format that does not fit the
        model, static activations that were never calibrated.
    """
    if format not in FORMATS:
        raise UserError(f"export.format is {format!r}; {did_you_mean(str(format), FORMATS)}")
    kept = dtype_name(dtype) or "bfloat16"
    path = Path(target)
    if (path.suffix == ".gguf") != (format == "gguf"):
        wanted = "a file that ends in .gguf" if format == "gguf" else "a directory, which cannot end in .gguf"
        raise UserError(f"export.path is {str(target)!r}; format {format} is {wanted}.")
    for place in (path, manifest.path_beside(path)) if format == "gguf" else (path,):
        refuse_existing(place, "export.path")
    source = _source(what, policy, text_only, step, base)
    home = None if tokenizer is None else Path(tokenizer)

    def describe(outcome: Outcome) -> Mapping[str, Any]:
        return manifest.describe(source, outcome, form=format, dtype=kept, policy=policy)

    common: dict[str, Any] = {"dtype": kept, "requantise": requantise, "manifest": describe}
    towers = None
    if format == "gguf":
        vocabulary, name = _vocabulary(home, source), name or path.stem
        if source.cfg.is_multimodal:
            towers = mmproj.mmproj_path(path)
            mmproj.write_mmproj(source, towers, dtype=kept, name=name)
        try:
            outcome = gguf.write_gguf(source, path, tokenizer=vocabulary, name=name, **common)
        except BaseException:  # neither without the other
            if towers is not None:
                towers.unlink(missing_ok=True)
            raise
    else:
        common |= {"max_shard_size": max_shard_size, **_tokenizer_files(home, source)}
        if format == "hf":
            outcome = hf_export.write_hf(source, path, **common)
        elif format == "mobile":
            outcome = mobile.write_mobile(source, path, **common)
        else:
            outcome = compressed_tensors.write_compressed_tensors(source, path, experts=experts, **common)
    how, activations = manifest.how(source, policy), manifest.activations(source, format)
    return Report(path, manifest.path_beside(path), outcome, how, activations, towers)


def _source(what: Any, policy: str | None, text_only: bool, step: Which, base: Any) -> Source:
    """The weights, on the grids they are to be written on."""
    source = of_model(what) if isinstance(what, Transformer) else what
    if not isinstance(source, Source):
        source = of_path(source, text_only=text_only, step=step, base=base)
    source = source.text_only() if text_only else source
    if policy is None:
        return source
    if policy not in policies.POLICIES:
        raise UserError(f"export.policy is {policy!r}; {did_you_mean(policy, policies.POLICIES)}")
    config: Any = policies.QuantConfig(policy=policy)  # pyright: ignore[reportArgumentType]
    return source.with_grids_of(policies.apply(source.model(), config))


def _vocabulary(home: Path | None, source: Source) -> Any:
    if home is None:
        raise UserError(
            "A GGUF file carries its tokenizer, and there is none beside the checkpoint; set export.tokenizer."
        )
    return gguf_tokenizer.metadata_of(home, source.cfg.vocab_size)


def _tokenizer_files(home: Path | None, source: Source) -> dict[str, Any]:
    """Which files go along, and the ids at which generation stops."""
    if home is None:
        return {"stop_ids": STOP_IDS}
    file = find_file(home)
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size != source.cfg.vocab_size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} pieces and the model {source.cfg.vocab_size}; name the model's own."
        )
    beside = [file.parent / name for name in _BESIDE] if home.is_dir() else [file]
    return {"stop_ids": tokenizer.stop_ids, "extra_files": [path for path in beside if path.is_file()]}

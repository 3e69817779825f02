"""Which files of a Hugging Face directory hold which tensors; an index is not believed where files say otherwise."""

import json
from pathlib import Path
from typing import Any

from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.safetensors_io import Tensor, read_header
from gemma4_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name in the file; headers are read and checked, data is not.

    The single file wins over an index, as in transformers.

    Raises:
      UserError: no weights; an index that is no index, names a file outside the directory or a missing one, or disagrees
        with the files; a tensor in two files; whatever `read_header` refuses.
    """
    if (directory / SINGLE).exists():
        return read_header(_inside(directory, SINGLE))
    if (directory / INDEX).exists():
        return _indexed(directory)
    stray = sorted(path.name for path in directory.glob("*.safetensors"))
    if stray:
        raise UserError(f"{directory} has {listed(stray)} but no {INDEX}; copy the index of these shards beside them.")
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    hint = f"; {listed(pickles)} is not read: pickles run code" if pickles else ""
    raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}.")


def read_json(path: Path) -> dict[str, Any]:
    """A file that must be a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object, got {type(value).__name__}.")
    return value


def _indexed(directory: Path) -> dict[str, Tensor]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UserError(f"{index} has no weight_map from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    files = {shard: _inside(directory, shard) for shard in shards}  # refuse bad paths before looking for files
    absent = [shard for shard, file in files.items() if not file.is_file()]
    if absent:
        raise UserError(f"{directory} lacks {listed(absent)}, which {INDEX} names; fetch the missing shards.")
    found: dict[str, Tensor] = {}
    wrong = []
    for shard, file in files.items():
        tensors = read_header(file)
        twice = tensors.keys() & found.keys()
        if twice:
            first = sorted(twice)[0]
            raise UserError(
                f"{directory} holds {len(twice)} tensors twice: {listed(sorted(twice))} (the first in {found[first].file.name} "
                f"and {shard})."
            )
        wrong += [f"{name} (in {shard})" for name in tensors if weight_map.get(name) != shard]
        found |= tensors
    absent = [f"{name} (wanted in {shard})" for name, shard in weight_map.items() if name not in found]
    if absent or wrong:
        raise UserError(
            f"{index} does not describe its shards: {len(absent)} tensors are absent ({listed(absent) or 'none'}), "
            f"{len(wrong)} are elsewhere or not listed ({listed(wrong) or 'none'})."
        )
    return found


def _is_file_name(name: Any) -> bool:
    """Whether a file system could have a file of that name at all."""
    return isinstance(name, str) and len(name) < 200 and name.isprintable()


def _inside(directory: Path, name: str) -> Path:
    """The file `name` of the directory, refusing whatever leads out of it.

    A Hugging Face cache directory (snapshots/REVISION) is made of links into the blobs directory beside it; these are
    followed, no others.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{directory / INDEX} names {name!r}; wanted bare file names inside the directory.")
    home = directory.resolve()
    target = (home / name).resolve()
    rooms = [home]
    if home.parent.name == "snapshots":
        rooms.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(room) for room in rooms):
        raise UserError(f"{directory / name} is a link to {target}, outside the checkpoint; copy the file instead.")
    return directory / name

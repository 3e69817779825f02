"""Digests of arrays and of files: what tells a checkpoint from one that lost a bit.

Orbax stores no checksum of array data (120 of 120 flipped bits were restored silently). Each array's digest is taken
from the arrays themselves before they leave the devices, and stands in the step's meta; each file's is taken when all are
written, before the step gets its name. The first says that what was read is what was saved, and the second which
file changed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

FILES = "digests.json"
_NOT_OURS = ("commit_success.txt", "_CHECKPOINT_METADATA", FILES)
"""In a step's own directory: written after the digests, or the digests themselves."""


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """A digest of every array, 16 hexadecimal digits; the same however the array is cut over devices.

    Any change of one element changes it for certain, any other with probability 1 - 2^-64.
    """
    found = {name: _digest(x) for name, x in arrays.items()}  # all are started before one is waited for
    return {name: _hexadecimal(words) for name, words in found.items()}


def run_digest(runs: Iterable[tuple[int, np.ndarray]]) -> str:
    """The same digest of an array given as (place of the first element, elements) [n], run by run."""
    total = np.zeros(2, np.uint32)
    for start, values in runs:
        if values.dtype.itemsize > 4:
            raise ValueError(f"runs of {values.dtype} have no digest here")
        total += np.asarray(_run_digest(values, np.uint32(start & 0xFFFFFFFF)))  # wraps around
    return _hexadecimal(total)


def _hexadecimal(words: Any) -> str:
    return "".join(f"{int(word):08x}" for word in np.asarray(words))


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """uint32 [2]: sums modulo 2^32 over all elements of two hashes of (bits, position)."""
    bits = _bits(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return _sums(bits, place)


@jax.jit
def _run_digest(x: jax.Array, start: jax.Array) -> jax.Array:
    """The share of `_digest` of elements [n] that lie next to each other from `start` on."""
    return _sums(_bits(x), start + jax.lax.iota(jnp.uint32, x.shape[0]))


def _sums(bits: jax.Array, place: jax.Array) -> jax.Array:
    """uint32 [2] of bits and places of one shape.

    The first hash is one to one in the bits, so one changed element always changes the sum. A sum, because each device
    can make its share of it; position, because else swapped elements would not show.
    """
    one = _mixed(bits ^ _mixed(place + jnp.uint32(0x9E3779B9)))
    other = _mixed(one ^ (place * jnp.uint32(0x85EBCA6B) + jnp.uint32(0x27D4EB2F)))
    return jnp.stack([one.sum(dtype=jnp.uint32), other.sum(dtype=jnp.uint32)])


def _bits(x: jax.Array) -> jax.Array:
    """The bits of x's elements as uint32; of elements wider than that, as more of them."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}") if x.dtype.itemsize < 4 else jnp.dtype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A one-to-one scramble of uint32 (the end of MurmurHash3)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def write_file_digests(directory: epath.Path) -> int:
    """Writes SHA-256 and size of every file of a step whose files are all there; returns the bytes read."""
    found = {name: {"sha256": _sha256(path), "bytes": path.stat().length} for name, path in _files(directory)}
    (directory / FILES).write_text(json.dumps(found, indent=1) + "\n")
    return sum(entry["bytes"] for entry in found.values())


def file_damage(directory: epath.Path, share: tuple[int, int] = (0, 1)) -> list[str] | None:
    """What is wrong with the files of a step, a phrase each; None if the step has no digests of files.

    `share` (i, n): of n readers this is number i, and reads every n-th file.
    """
    record = directory / FILES
    if not record.exists():
        return None
    try:
        wanted: dict[str, Any] = json.loads(record.read_text())
        pairs = {name: (entry["sha256"], int(entry["bytes"])) for name, entry in wanted.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{FILES} cannot be read"]
    have = dict(_files(directory))
    damage = [f"{name} is missing" for name in pairs if name not in have]
    damage += [f"{name} does not belong there" for name in have if name not in pairs]
    for name, (sha256, size) in list(pairs.items())[share[0] :: share[1]]:
        if name not in have:
            continue
        if (length := have[name].stat().length) != size:
            damage.append(f"{name} has {length:,} bytes and had {size:,}")
        elif _sha256(have[name]) != sha256:
            damage.append(f"{name} is not what was written")
    return damage


def step_bytes(directory: epath.Path) -> int:
    """Bytes of all files of a step."""
    return sum(path.stat().length for _, path in _files(directory))


def _files(directory: epath.Path) -> Iterator[tuple[str, epath.Path]]:
    """Every file below a step by its relative name, sorted; without those that are written after the digests."""
    here = [directory]
    found = []
    while here:
        for path in here.pop().iterdir():
            if path.is_dir():
                here.append(path)
            elif path.parent != directory or path.name not in _NOT_OURS:
                found.append(("/".join(path.parts[len(directory.parts) :]), path))
    return iter(sorted(found))


def _sha256(path: epath.Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()

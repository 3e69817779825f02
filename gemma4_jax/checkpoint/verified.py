"""Reading steps of which no bit may have changed, and saying which files and arrays have."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma4_jax.checkpoint.digest import digests, file_damage, run_digest
from gemma4_jax.checkpoint.mismatch import listed
from gemma4_jax.checkpoint.steps import Form, read_arrays, read_record, saved_forms
from gemma4_jax.checkpoint.stored import open_stored
from gemma4_jax.errors import UserError

T = TypeVar("T")

GROUP = 1 << 30
"""Bytes of parameters that are read, compared and cast at a time."""


def refuse_damaged_files(directory: epath.Path) -> None:
    """UserError if a file of the step differs from its digest; each of several processes reads a share of the files."""
    found = file_damage(directory, (jax.process_index(), jax.process_count()))
    if _anywhere(bool(found)):
        raise UserError(damage(directory))


def refuse_damaged_arrays(directory: epath.Path, names: Iterable[str]) -> None:
    """UserError if one of these arrays has not its digest; read block by block, for who reads them block by block afterwards."""
    wanted = array_digests(directory)
    if any(name in wanted and run_digest(open_stored(directory, name).runs()) != wanted[name] for name in names):
        raise UserError(damage(directory))


def read_verified(directory: epath.Path, like: dict[str, Any], wanted: Mapping[str, str]) -> dict[str, jax.Array]:
    """`read_arrays` in the saved dtypes; UserError names files and arrays if one of them has not its digest in `wanted`."""
    values = read_arrays(directory, like)
    have = digests({name: value for name, value in values.items() if name in wanted})
    if any(have[name] != wanted[name] for name in have):
        raise UserError(damage(directory))
    return values


def read_as(directory: epath.Path, like: dict[str, Any]) -> dict[str, jax.Array]:
    """`read_arrays` with every array compared with its digest, then cast to the dtype wanted, GROUP bytes at a time.

    Files are not compared: a run's hold the optimizer's state too, which nobody asked for.

    Raises:
      UserError: an array differs from what was saved; it names arrays and files.
    """
    wanted, forms = array_digests(directory), saved_forms(directory)
    values: dict[str, jax.Array] = {}
    for names in _groups(forms, list(like)):
        saved = {
            name: jax.ShapeDtypeStruct(forms[name].shape, forms[name].dtype, sharding=like[name].sharding)
            for name in names
        }
        read = read_verified(directory, saved, wanted)
        values |= {name: value.astype(like[name].dtype) for name, value in read.items()}
    return values


def _groups(forms: dict[str, Form], names: list[str]) -> list[list[str]]:
    """The names in groups of about GROUP bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        if size > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += math.prod(forms[name].shape) * jnp.dtype(forms[name].dtype).itemsize
    return groups


def array_digests(directory: epath.Path) -> dict[str, str]:
    """The digest of each array when the step was saved; empty for steps of versions that took none."""
    return read_record(directory).get("digests") or {}


def damage(directory: epath.Path) -> str:
    """One sentence on what differs between a step and what was written, files and arrays; empty if nothing does.

    Reads everything, one array at a time.
    """
    files = file_damage(directory) or []
    wanted, forms = _or_nothing(array_digests, directory), _or_nothing(saved_forms, directory)
    arrays = sorted(wanted.keys() - forms.keys())
    for name, form in forms.items():
        try:
            value = read_arrays(directory, {name: jax.ShapeDtypeStruct(form.shape, form.dtype)})
            changed = name in wanted and digests(value)[name] != wanted[name]
        except UserError:
            changed = True
        arrays += [name] * changed
    if not files and not arrays:
        return ""
    what = f"files: {listed(files, '; ')}" if files else "every file with a digest is as it was"
    which = f"arrays: {listed(arrays)}" if arrays else "no array is affected"
    return f"The checkpoint {directory} is damaged ({what}; {which})."


def _anywhere(found: bool) -> bool:
    """Whether any process found something."""
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(found)).any())


def _or_nothing(read: Callable[[epath.Path], dict[str, T]], directory: epath.Path) -> dict[str, T]:
    try:
        return read(directory)
    except UserError:
        return {}

"""What a checkpoint holds against what is wanted, as one sentence: tensors, and the config of a run."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from gemma4_jax.errors import UserError

LISTED = 8
"""Names an error message lists before it only counts."""


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f"{separator}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Names wanted but absent, present but unknown, and present in another form (already described)."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    @classmethod
    def between(cls, wanted: Mapping[str, object], got: Mapping[str, object]) -> "Mismatch":
        """Compares names, and forms (shapes; or anything with `==` and `str`) where both sides have the name."""
        return cls(
            [name for name in wanted if name not in got],
            [name for name in got if name not in wanted],
            [
                f"{name} (wanted {wanted[name]}, got {got[name]})"
                for name in wanted
                if got.get(name, ...) not in (..., wanted[name])
            ],
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        """`2 missing (a, b); 1 unexpected (c)`."""
        return "; ".join(
            f"{len(names)} {kind}: {listed(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("misshaped", self.misshaped),
            )
            if names
        )


def compare_configs(
    saved: Mapping[str, Any], now: Mapping[str, Any], ignore: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    """Lines `key: saved -> now` for every dotted key that differs; `ignore` holds dotted keys or whole sections."""

    def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(value, Mapping) and value:
                out |= flat(value, f"{prefix}{key}.")
            else:
                out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
        return out

    old, new = flat(saved), flat(now)
    skipped = {key for key in old.keys() | new.keys() if any(key == i or key.startswith(f"{i}.") for i in ignore)}
    keys = [key for key in {**old, **new} if key not in skipped]
    absent = "(absent)"
    differ = [key for key in keys if old.get(key, absent) != new.get(key, absent)]
    return [f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}" for key in differ]


def refuse_other_config(
    directory: str | os.PathLike[str],
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    ignore: frozenset[str] | set[str] = frozenset(),
) -> None:
    """UserError with the differing keys unless a run may go on with `now` where it stood with `saved`."""
    differ = compare_configs(saved, now, ignore)
    if differ:
        raise UserError(
            f"{os.fspath(directory)} holds a run with another config ({listed(differ, '; ')}); set these back, or choose "
            "another directory."
        )

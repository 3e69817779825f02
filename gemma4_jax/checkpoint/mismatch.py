"""What a checkpoint holds against what is wanted, as one sentence: tensors, and the config of a run."""

import dataclasses
from collections.abc import Iterable, Mapping

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

"""Names of layers' modules as few regular expressions, as configs of quantised checkpoints list them."""

import re
from collections.abc import Sequence


def layer_patterns(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """Patterns that match, among the modules of `every`, exactly those of `chosen` (names as in `names.table`).

    One pattern for a module of all layers where all are chosen, else one that lists the layers.
    """
    found = []
    for suffix in dict.fromkeys(_kind(name) for name in chosen):
        mine = [name for name in chosen if _kind(name) == suffix]
        module = re.escape(suffix.removesuffix(".weight"))
        layered = mine[0].startswith("layers.")
        whole = len(mine) == sum(_kind(name) == suffix for name in every)
        layers = r"\d+" if whole else "(?:" + "|".join(name.split(".")[1] for name in mine) + ")"
        # A stacked tensor of experts stands for the modules inside it.
        inside = "" if suffix.endswith(".weight") else r"\..*"
        found.append((rf"layers\.{layers}\.{module}" if layered else module) + inside + "$")
    return found


def _kind(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", name)

"""Tables for a terminal: words to the left, numbers to the right, paths from where one stands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GAP = "  "


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of aligned columns under a rule. A column is right-aligned where all its cells are numbers or missing (None)."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"each row needs {len(header)} cells, as the header has, got {[len(row) for row in rows]}.")
    cells = [[_cell(value) for value in row] for row in rows]
    columns = range(len(header))
    widths = [max(len(header[i]), *(len(row[i]) for row in cells)) if cells else len(header[i]) for i in columns]
    numeric = [all(_is_number(row[i]) for row in rows) for i in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(texts, widths, numeric, strict=True)
        ]
        return GAP.join(padded).rstrip()

    return "\n".join([line(header), GAP.join("-" * width for width in widths), *map(line, cells)])


def percent(share: float) -> str:
    """`97.4 %`."""
    return f"{100 * share:.1f} %"


def near(value: Any) -> Any:
    """An absolute path below the working directory from there on, as one would type it; also in a list. Else the value itself."""
    if isinstance(value, list | tuple):
        return type(value)(near(one) for one in value)
    here = f"{Path.cwd()}/"
    return value.removeprefix(here) or value if isinstance(value, str) else value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool)) or _looks_numeric(value)


def _looks_numeric(value: Any) -> bool:
    """`1,234`, `97.4 %`, `-`: a number that was formatted before."""
    return isinstance(value, str) and value != "" and not value.strip("0123456789.,-+ %")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

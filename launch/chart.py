"""Line charts as SVG text: small enough to stand in a page, coloured by its style sheet, readable in light and dark."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

from gemma4_jax.train.metrics import si

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 30
POINTS = 400
"""More than a line can show; longer series are thinned to the lowest and highest of each stretch."""

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line, or dots where there are few points; `ink` is the number of its colour, from 1."""

    name: str
    points: Sequence[Point]
    ink: int = 1
    dots: bool = False


def share(value: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * value:.3g} %"


def line_chart(series: Sequence[Series], form: Callable[[float], str] = si, floor: float | None = None) -> str:
    """An SVG of all series over steps, with gridlines, a name where there are several, and a tooltip on every point.

    `floor`: a value that the axis begins at, if all values are above; none: below the lowest value.
    """
    shown = [dataclasses.replace(each, points=_thinned(_finite(each.points))) for each in series]
    shown = [each for each in shown if each.points]
    if not shown:
        raise ValueError("a chart needs at least one finite point")
    xs = [x for each in shown for x, _ in each.points]
    ys = [y for each in shown for _, y in each.points]
    low = min(ys) if floor is None else min(floor, *ys)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6, whole=True), ticks(low, max(ys), 5)
    x_from, x_to = min(xs), max(max(xs), min(xs) + 1)
    y_from, y_to = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> tuple[float, float]:
        across, up = (point[0] - x_from) / (x_to - x_from), (point[1] - y_from) / (y_to - y_from)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">']
    for tick in y_ticks:
        _, y = at((x_from, tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(form(tick))}</text>')
    for tick in (tick for tick in x_ticks if x_from <= tick <= x_to):
        x, _ = at((tick, y_from))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{si(tick)}</text>')
    for each in shown:
        places = [at(point) for point in each.points]
        if not each.dots:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line ink{each.ink}" points="{line}"/>')
        radius = 4 if each.dots or len(places) == 1 else 6
        kind = "dot" if each.dots or len(places) == 1 else "target"
        for (x, y), (step, value) in zip(places, each.points, strict=True):
            told = escape(f"{each.name}, step {step:,.0f}: {form(value)}")
            parts.append(
                f'<circle class="{kind} ink{each.ink}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{told}</title></circle>'
            )
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers, from one at or below `low` to one at or above `high`; two different ones at least."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    raw = span / max(most - 1, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    step = max(1, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The same in one line of text, low to high as blocks of eight heights."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    means = []
    for index in range(count):
        part = finite[index * len(finite) // count : (index + 1) * len(finite) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7.999 * (mean - low) / (high - low)) if high > low else 3] for mean in means)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _thinned(points: list[Point]) -> list[Point]:
    """At most POINTS, with every peak kept."""
    if len(points) <= POINTS:
        return points
    stretches = POINTS // 2
    kept: list[Point] = []
    for index in range(stretches):
        part = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return sorted({points[0], *kept, points[-1]})

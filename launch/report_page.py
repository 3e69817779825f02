"""A `Record` as a page: HTML with plots in it, or Markdown with lines of blocks."""

import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, NamedTuple

from gemma4_jax.train.metrics import duration, si
from launch.chart import Series, line_chart, share, sparkline
from launch.report import Record


def gib(value: float) -> str:
    """A size."""
    return f"{value:.3g} GiB"


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:.1e}" if value else "0"


def plain(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


class Plot(NamedTuple):
    """Metrics that share a picture: (name in metrics.jsonl, name in the legend)."""

    title: str
    lines: tuple[tuple[str, str], ...]
    form: Callable[[float], str] = plain
    floor: float | None = None
    unit: float = 1.0  # of the numbers in the file, so that ticks are round in what is shown


PLOTS = (
    Plot("Loss", (("train/loss", "training"), ("eval/loss", "held-out"))),
    Plot("Next-token accuracy", (("train/accuracy", "training"), ("eval/accuracy", "held-out")), share),
    Plot("Distance from the float teacher (KL)", (("train/kl", "training"),), floor=0.0),
    Plot("Throughput, tokens a second", (("train/tokens_per_second", "tokens/s"),), si, 0.0),
    Plot("Share of peak FLOP/s (MFU)", (("train/mfu", "MFU"),), share, 0.0),
    Plot("Goodput of the process", (("train/goodput", "goodput"),), share, 0.0),
    Plot("Peak memory of a device", (("train/peak_bytes", "peak"),), gib, 0.0, 2**30),
    Plot("Gradient norm", (("train/grad_norm", "before clipping"),), plain, 0.0),
    Plot("Learning rate", (("train/learning_rate", "learning rate"),), rate, 0.0),
    Plot("Load of the fullest expert, times the mean", (("train/max_load", "load"),), plain, 1.0),
    Plot("Skipped updates", (("train/skipped", "since the last line"),), plain, 0.0),
)

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1b1b1a; --soft: #6b6a66; --rule: #e6e5e1;
  --ink1: #2a6fdb; --ink2: #d4581c; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --card: #222221; --ink: #ececea; --soft: #a2a19c; --rule: #393936;
  --ink1: #6ba3f5; --ink2: #f08a4b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 36px 0 12px; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.tile, figure, details, table { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: 10px 14px; } .tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px 14px 4px; } figcaption { font-weight: 600; font-size: 14px; }
.key { font-weight: 400; color: var(--soft); margin-left: 14px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; } .tick { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.ink1 { stroke: var(--ink1); } .line.ink2 { stroke: var(--ink2); }
.dot.ink1, i.ink1 { fill: var(--ink1); background: var(--ink1); } .dot.ink2, i.ink2 { fill: var(--ink2); background: var(--ink2); }
.dot { stroke: var(--card); stroke-width: 1.5; } .target { fill: transparent; }
.target.ink1:hover { fill: var(--ink1); } .target.ink2:hover { fill: var(--ink2); }
details { margin-bottom: 8px; padding: 8px 14px; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 4px; font-size: 13px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; overflow: hidden; }
td, th { text-align: left; padding: 5px 14px; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; } td.was { color: var(--soft); }
"""


def html(run: Record) -> str:
    """One file, with style and plots inside and nothing outside."""
    name = escape(str(run.directory))
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in facts(run)
    )
    plots = "".join(_figure(run, plot) for plot in drawn(run))
    samples = "".join(
        f"<details{' open' if index == 0 else ''}><summary>after step {row['step']:,}</summary>"
        f"<pre>{escape(row['text'])}</pre></details>"
        for index, row in enumerate(reversed(run.samples))
    )
    changed = "".join(
        f'<tr><td>{escape(key)}</td><td>{_shown(value)}</td><td class="was">{_shown(default)}</td></tr>'
        for key, (value, default) in run.changed.items()
    )
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f'<h1>{name}</h1><div class="soft">{escape(subtitle(run))}</div><div class="tiles">{tiles}</div>',
            f'<h2>Curves</h2><div class="plots">{plots}</div>',
            f"<h2>Samples</h2>{samples}" if samples else "",
            "<h2>Settings that differ from their defaults</h2>",
            f"<table><tr><th>key</th><th>this run</th><th>default</th></tr>{changed}</table>",
            "</body></html>",
        ]
    )


def markdown(run: Record) -> str:
    """The same for places that show no HTML."""
    lines = [f"# {run.directory}", "", subtitle(run), "", "| | |", "|---|---|"]
    lines += [f"| {label} | {_cell(value)} |" for label, value in facts(run)]
    lines += ["", "## Curves", "", "| | first | lowest | highest | last | over the run |", "|---|---|---|---|---|---|"]
    for plot in drawn(run):
        for key, label in plot.lines:
            values = [value / plot.unit for _, value in run.series(key)]
            if values:
                ends = (values[0], min(values), max(values), values[-1])
                named = plot.title if len(plot.lines) == 1 else f"{plot.title}, {label}"
                lines.append(f"| {named} | {' | '.join(map(plot.form, ends))} | `{sparkline(values)}` |")
    if run.samples:
        newest = run.samples[-1]
        lines += ["", f"## Samples after step {newest['step']:,}", "", "```", newest["text"], "```"]
    lines += ["", "## Settings that differ from their defaults", "", "| key | this run | default |", "|---|---|---|"]
    lines += [f"| {key} | {_cell(value)} | {_cell(default)} |" for key, (value, default) in run.changed.items()]
    return "\n".join(lines) + "\n"


def subtitle(run: Record) -> str:
    """What kind of run, and when."""
    when = [row["time"] for row in run.metrics if "time" in row]
    ended = f", last line {time.strftime('%Y-%m-%d %H:%M', time.localtime(when[-1]))}" if when else ""
    model = run.config.get("model.path") or run.config.get("model.variant") or "a model"
    return f"{run.task} of {model}{ended}"


def facts(run: Record) -> Iterator[tuple[str, str]]:
    """(what, value) of the tiles."""
    total = run.config.get("train.steps")
    yield "steps", f"{run.steps:,}" + (f" of {total:,}" if total and total != run.steps else "")
    for label, name, form in (
        ("training loss", "train/loss", plain),
        ("held-out loss", "eval/loss", plain),
        ("tokens a second", "train/tokens_per_second", si),
        ("MFU", "train/mfu", share),
    ):
        if (value := run.last(name)) is not None:
            yield label, form(value)
    peak = max((value for _, value in run.series("train/peak_bytes")), default=None)
    if peak is not None:
        yield "peak memory", gib(peak / 2**30)
    if run.seconds is not None and run.goodput is not None:
        yield "time", duration(run.seconds)
        yield "goodput, restarts included", share(run.goodput)
    if run.attempts > 1:
        yield "starts", str(run.attempts)
    skipped = sum(value for _, value in run.series("train/skipped"))
    if skipped:
        yield "skipped updates", f"{skipped:,.0f}"
    if run.bad_rows:
        yield "rows that cannot be used", f"{run.bad_rows:,}"
    if run.checkpoints:
        yield "checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints)


def drawn(run: Record) -> Iterator[Plot]:
    """The plots this run has something for; what is zero throughout is nothing."""
    for plot in PLOTS:
        if any(value for key, _ in plot.lines for _, value in run.series(key)):
            yield plot


def _figure(run: Record, plot: Plot) -> str:
    found = [
        (key, label, [(step, value / plot.unit) for step, value in run.series(key)])
        for key, label in plot.lines
        if run.series(key)
    ]
    series = [
        Series(label, points, ink, dots=key.startswith("eval/"))
        for ink, (key, label, points) in enumerate(found, start=1)
    ]
    keys = "".join(f'<span class="key"><i class="ink{each.ink}"></i>{escape(each.name)}</span>' for each in series)
    caption = escape(plot.title) + (keys if len(series) > 1 else "")
    return f"<figure><figcaption>{caption}</figcaption>{line_chart(series, plot.form, plot.floor)}</figure>"


def _shown(value: Any) -> str:
    return escape("none" if value is None else str(value))


def _cell(value: Any) -> str:
    return ("none" if value is None else str(value)).replace("|", "\\|").replace("\n", " ")

"""`report.html`: one self-contained page with the loss curve and the numbers of a run."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.train.job import Job
from plait.train.tuning_job import TuningJob

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
_POINTS = 600
_COLOURS = ("#3566c9", "#d9622b", "#2f9e62", "#9b4fc4", "#b8860b", "#c2334d", "#4a5568")
Points = list[tuple[float, float]]


def render_report(
    job: Job | TuningJob,
    records: Sequence[dict[str, Any]],
    summary: Sequence[tuple[str, str]],
    sample: str,
) -> str:
    """Make the page. `summary` is shown as a table; `sample` as text."""
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in summary
    )
    shown = f"<h2>Sample</h2><pre>{html.escape(sample)}</pre>" if sample else ""
    return _PAGE.format(
        name=html.escape(job.name), rows=rows, chart=_chart(train, heldout), sample=shown
    )


def draw_curves(runs: Mapping[str, Sequence[dict[str, Any]]], tables: Sequence[str]) -> str:
    """Make a page that compares runs: their losses in one picture, train thin, held-out thick."""
    series: list[_Series] = []
    for number, (name, records) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        train = [(r["step"], r["loss"]) for r in records if "loss" in r]
        heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
        title = f"<title>{html.escape(name)}</title>"
        thin = f'style="stroke:{colour};stroke-width:1"'
        series += [_Series(thin, _thin(_smooth(train)), title)] if train else []
        series += [_Series(f'style="stroke:{colour}"', heldout, title)] if heldout else []
    keys = "".join(
        f'<span style="background:{_COLOURS[i % len(_COLOURS)]}"></span>{html.escape(name)}'
        for i, name in enumerate(runs)
    )
    return _COMPARISON.format(tables="".join(tables), chart=_draw(series), keys=keys)


@dataclass(frozen=True)
class _Series:
    """One line of a chart: its SVG attributes, its points, and what stands inside the element."""

    attributes: str
    points: Points
    inside: str = ""


def _chart(train: Points, heldout: Points) -> str:
    if not train:
        return _draw([])
    curve = _Series('class="train"', _thin(_smooth(train)))
    return _draw([curve, _Series('class="heldout"', heldout)], marked=heldout)


def _draw(series: Sequence[_Series], *, marked: Sequence[tuple[float, float]] = ()) -> str:
    points = [point for line in series for point in line.points]
    if not points:
        return "<p>No step was made.</p>"
    losses = [y for _, y in points]
    low, high = math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2
    last_step = max(1.0, *(x for x, _ in points))

    def place(x: float, y: float) -> str:
        across = _LEFT + x / last_step * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / max(high - low, 0.5) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    lines: list[str] = []
    for value in _ticks(low, high):
        x, y = place(0, value).split(",")
        lines.append(f'<line class="grid" x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y}" class="left">{value:g}</text>')
    for value in _ticks(0, last_step):
        x, y = place(value, low).split(",")
        lines.append(f'<text x="{x}" y="{float(y) + 18:.1f}" class="below">{value:g}</text>')
    for line in series:
        places = " ".join(place(*point) for point in line.points)
        lines.append(f'<polyline {line.attributes} points="{places}">{line.inside}</polyline>')
    for point in marked:
        x, y = place(*point).split(",")
        lines.append(f'<circle class="heldout" cx="{x}" cy="{y}" r="3"/>')
    lines.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" class="below">step</text>')
    lines.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" class="below">'
        "loss [nats/token]</text>"
    )
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss over steps"'
    return f"<svg {box}>{''.join(lines)}</svg>"


def _smooth(points: Points) -> Points:
    """Running mean with a memory of 2 % of the run, free of start-up bias."""
    keep = 1 - 1 / max(1.0, 0.02 * len(points))
    mean = weight = 0.0
    smoothed: Points = []
    for step, loss in points:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed


def _thin(points: Points) -> Points:
    every = max(1, len(points) // _POINTS)
    return points[::every] + ([points[-1]] if (len(points) - 1) % every else [])


def _ticks(low: float, high: float) -> list[float]:
    """About six round values from low to high."""
    rough = max(high - low, 1e-9) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430 }
body { max-width: 960px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .25rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0 }
th { text-align: left; font-weight: 500; color: #5a6272; padding: .15rem 2rem .15rem 0 }
td { font-variant-numeric: tabular-nums; padding: .15rem 2rem .15rem 0 }
svg { width: 100%; height: auto; font-size: 12px } .grid { stroke: #e3e6ec }
polyline { fill: none; stroke-width: 2 }
polyline.train { stroke: #3566c9 } polyline.heldout { stroke: #d9622b }
circle.heldout { fill: #d9622b } text { fill: #5a6272 }
text.left { text-anchor: end; dominant-baseline: middle } text.below { text-anchor: middle }
.key span { display: inline-block; width: 1.5rem; height: 3px; vertical-align: middle }
.key span { margin: 0 .4rem 0 1rem }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; border-radius: 4px }
</style>"""
_HEAD = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{_STYLE}'.replace(
    "{", "{{"
).replace("}", "}}")
_PAGE = (
    _HEAD
    + """<title>{name} - plait</title></head><body><h1>{name}</h1><table>{rows}</table>
<h2>Loss</h2>{chart}
<p class="key"><span style="background:#3566c9"></span>train (running mean)
<span style="background:#d9622b"></span>held-out</p>{sample}</body></html>
"""
)
_COMPARISON = (
    _HEAD
    + """<title>runs - plait</title></head><body><h1>Runs</h1>{tables}<h2>Loss</h2>{chart}
<p class="key">{keys} (thin: train, running mean; thick: held-out)</p></body></html>
"""
)

"""`report.html`: one self-contained page with the loss curve and the numbers of a run."""

import html
import math
from collections.abc import Sequence
from typing import Any

from plait.train.job import Job
from plait.train.tuning_job import TuningJob

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
_POINTS = 600
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


def _chart(train: Points, heldout: Points) -> str:
    if not train:
        return "<p>No step was made.</p>"
    smooth = _thin(_smooth(train))
    losses = [y for _, y in smooth + heldout]
    low, high = math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2
    last_step = max(x for x, _ in train)

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
    lines.append(f'<polyline class="train" points="{" ".join(place(*p) for p in smooth)}"/>')
    lines.append(f'<polyline class="heldout" points="{" ".join(place(*p) for p in heldout)}"/>')
    for point in heldout:
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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name} - plait</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2430 }}
body {{ max-width: 960px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: .25rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th {{ text-align: left; font-weight: 500; color: #5a6272; padding: .15rem 2rem .15rem 0 }}
td {{ font-variant-numeric: tabular-nums }}
svg {{ width: 100%; height: auto; font-size: 12px }} .grid {{ stroke: #e3e6ec }}
polyline {{ fill: none; stroke-width: 2 }}
polyline.train {{ stroke: #3566c9 }} polyline.heldout {{ stroke: #d9622b }}
circle.heldout {{ fill: #d9622b }} text {{ fill: #5a6272 }}
text.left {{ text-anchor: end; dominant-baseline: middle }} text.below {{ text-anchor: middle }}
.key span {{ display: inline-block; width: 1.5rem; height: 3px; vertical-align: middle }}
.key span {{ margin: 0 .4rem 0 1rem }}
pre {{ background: #f5f6f8; padding: 1rem; overflow-x: auto; border-radius: 4px }}
</style></head><body><h1>{name}</h1><table>{rows}</table><h2>Loss</h2>{chart}
<p class="key"><span style="background:#3566c9"></span>train (running mean)
<span style="background:#d9622b"></span>held-out</p>{sample}</body></html>
"""

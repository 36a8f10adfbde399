"""The picture of an overlap report: two streams of each run, unsplit above overlapped, as SVG.

A page is one file without dependencies. All runs of a direction have one scale of time, so the
shorter one is seen to be shorter. A message is green where something is computed meanwhile, and red
where it is not.
"""

import html
from collections.abc import Sequence

from plait.cost.overlap import OverlapReport, exposed_intervals
from plait.cost.timeline import Event, Stream, Timeline

_WIDTH, _LEFT, _LANE, _GAP, _TITLE, _AXIS = 1000, 110, 22, 4, 24, 26
_SMALLEST = 0.4  # of a pixel: neighbours closer than that are drawn as one
_NUM_TICKS = 8
_PRODUCTS = ("mm", "attend", "attention", "linear", "conv")

_STYLE = """
.lanes { font: 12px system-ui, sans-serif; }
.lanes text { fill: #444; }
.lanes .title { font-weight: 600; fill: #111; }
.lanes .lane { fill: #f2f2f4; }
.lanes .product { fill: #3b6ea8; }
.lanes .other { fill: #93b5d9; }
.lanes .hidden { fill: #4f9d69; }
.lanes .exposed { fill: #d1495b; }
.lanes .tick { stroke: #d8d8dc; }
.lanes .end { stroke: #111; stroke-dasharray: 3 3; }
"""
_PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.headline td { font-weight: 700; }
pre { background: #f6f6f8; padding: .8rem; overflow-x: auto; }
svg { width: 100%; height: auto; }
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em;
            vertical-align: -.1em; }
"""
_KEY = (
    ("#3b6ea8", "products and attention"),
    ("#93b5d9", "other compute"),
    ("#4f9d69", "communication, hidden"),
    ("#d1495b", "communication, exposed"),
)

_DEFINITION = (
    "hidden = (Ts - To) / (Ts - Tn), net hidden = (T0 - To) / (T0 - Tn0); the second charges what "
    "splitting costs. Unsplit and split wait for each message at once; free: messages take no time."
)


def picture(timelines: Sequence[tuple[str, Timeline]]) -> str:
    """Draw timelines below each other, with their titles, on one scale, as one <svg>."""
    whole_s = max((timeline.duration_s for _, timeline in timelines), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - 10) / whole_s
    block = _TITLE + 2 * (_LANE + _GAP)
    height = len(timelines) * block + _AXIS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" class="lanes" '
        f'role="img"><style>{_STYLE}</style>'
    ]
    parts += _axis(whole_s, scale, len(timelines) * block)
    for i, (title, timeline) in enumerate(timelines):
        parts += _lanes(title, timeline, scale, i * block)
    return "\n".join([*parts, "</svg>"])


def direction_picture(report: OverlapReport, direction: str) -> str:
    """Draw the runs of "forward" or "backward"; "" if none was kept."""
    shown = [
        (name.partition(", ")[2], timeline)
        for name, timeline in report.timelines()
        if name.startswith(f"{direction}, ")
    ]
    return picture(shown) if shown else ""


def page(report: OverlapReport) -> str:
    """Lay the report out as an HTML page: figures, then the picture of each direction."""
    title = html.escape(report.title)
    times = str(report).partition("\n\n")[2]
    key = "".join(f'<span style="background:{color}"></span>{name}' for color, name in _KEY)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_PAGE_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _table(report),
        f'<p class="key">{key}</p>',
    ]
    for direction in report.times:
        drawn = direction_picture(report, direction)
        if drawn:
            parts += [f"<h2>{html.escape(direction.capitalize())}</h2>", drawn]
    parts.append(f"<pre>{html.escape(times)}</pre><p>{_DEFINITION}</p></body></html>")
    return "\n".join(parts)


def _table(report: OverlapReport) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in report.times)
    rows: list[str] = []
    for line in str(report).splitlines()[2:]:
        if not line:
            break
        name, values = line[:25].strip(), line[25:].split()
        mark = ' class="headline"' if name == "net hidden" else ""
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f"<tr{mark}><td>{name}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _axis(whole_s: float, scale: float, bottom: int) -> list[str]:
    step_s = _round_step(whole_s / _NUM_TICKS)
    parts: list[str] = []
    for i in range(int(whole_s / step_s) + 1):
        x = _LEFT + i * step_s * scale
        label = f"{i * step_s * 1e3:g}" + (" ms" if i == 0 else "")
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    return parts


def _round_step(at_least_s: float) -> float:
    """The smallest of 1, 2, 5, 10, ... that is no less, in seconds."""
    step = 1e-9
    while True:
        for factor in (1, 2, 5):
            if factor * step >= at_least_s:
                return factor * step
        step *= 10


def _lanes(title: str, timeline: Timeline, scale: float, top: int) -> list[str]:
    computed = [event for event in timeline.events if event.stream is Stream.COMPUTE]
    sent = [event for event in timeline.events if event.stream is Stream.COMMUNICATION]
    y = top + _TITLE
    parts = [
        f'<text class="title" x="{_LEFT}" y="{top + 16}">{html.escape(title)}: '
        f"{timeline.duration_s * 1e3:.4g} ms</text>"
    ]
    for i, lane in enumerate(("compute", "communication")):
        at = y + i * (_LANE + _GAP)
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 15}" text-anchor="end">{lane}</text>')
        parts.append(
            f'<rect class="lane" x="{_LEFT}" y="{at}" width="{_WIDTH - _LEFT - 10}" '
            f'height="{_LANE}"/>'
        )
    spans = [(_kind(event), event.start_s, event.end_s, event.name) for event in computed]
    parts += _boxes(spans, scale, y)
    below = y + _LANE + _GAP
    parts += _boxes([("hidden", x.start_s, x.end_s, x.name) for x in sent], scale, below)
    exposed = [("exposed", start, end, "exposed") for start, end in exposed_intervals(timeline)]
    parts += _boxes(exposed, scale, below)
    end = _LEFT + timeline.duration_s * scale
    parts.append(f'<line class="end" x1="{end:.1f}" x2="{end:.1f}" y1="{y}" y2="{below + _LANE}"/>')
    return parts


def _kind(event: Event) -> str:
    is_product = any(word in event.operator for word in _PRODUCTS)
    return "product" if is_product else "other"


def _boxes(spans: Sequence[tuple[str, float, float, str]], scale: float, top: int) -> list[str]:
    """Rectangles with their names; those of a kind that nearly touch become one where tiny."""
    drawn: list[tuple[str, float, float, str]] = []
    for kind, start_s, end_s, name in sorted(spans, key=lambda span: span[1]):
        left, right = _LEFT + start_s * scale, _LEFT + end_s * scale
        if drawn and drawn[-1][0] == kind and right - drawn[-1][1] < _SMALLEST:
            drawn[-1] = (kind, drawn[-1][1], right, drawn[-1][3])
        else:
            drawn.append((kind, left, right, name))
    return [
        f'<rect class="{kind}" x="{left:.2f}" y="{top}" width="{max(right - left - 0.3, 0.2):.2f}" '
        f'height="{_LANE}"><title>{html.escape(name)}</title></rect>'
        for kind, left, right, name in drawn
    ]

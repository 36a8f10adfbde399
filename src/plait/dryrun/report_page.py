"""A price as one HTML page: figures, the streams over time, memory over time, the ledger.

The page is one file without dependencies; its pictures are SVG. The streams are those of
`cost/overlap_picture.py`.
"""

import html
from collections.abc import Sequence

from plait.cost.overlap_picture import picture
from plait.dryrun.memory import Ledger
from plait.dryrun.memory_trace import Kind
from plait.dryrun.report import Titled, bytes_text, time_text, to_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1000, 220, 110, 26
_MOST_POINTS = 2000
_COLORS = {
    Kind.PARAMETERS: "#3b6ea8",
    Kind.GRADIENTS: "#93b5d9",
    Kind.OPTIMIZER: "#7a5fa0",
    Kind.ACTIVATIONS: "#4f9d69",
    Kind.TEMPORARIES: "#c9a227",
    Kind.INPUTS: "#8a8a8a",
    Kind.COMMUNICATION: "#d1495b",
    Kind.WORKSPACE: "#c97b4a",
    Kind.CONTEXT: "#444444",
}
PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
td.source { text-align: left; font-size: .8rem; color: #555; white-space: normal;
            overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f8; padding: .8rem; overflow-x: auto; font-size: .8rem; }
.memory text { font: 12px system-ui, sans-serif; fill: #444; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
"""


def page(titled: Titled) -> str:
    """Lay the report out."""
    price, title = titled.price, html.escape(titled.title)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{title}</title><style>{PAGE_STYLE}</style></head><body><h1>{title}</h1>",
            _figures(titled),
            f"<h2>Streams</h2><div id='streams'>{picture([('one rank', price.timeline)])}</div>",
            f"<h2>Memory over time</h2>{memory_picture(price.bytes_over_time)}",
            f"<h2>At the peak</h2>{_ledger_table(price.memory)}",
            f"<h2>Largest</h2>{_largest_table(price.memory)}",
            f"<h2>All figures</h2><pre>{html.escape(to_text(titled))}</pre></body></html>",
        ]
    )


def _figures(titled: Titled) -> str:
    price = titled.price
    rows = [
        ("step time", f"{time_text(price.step_s)}"),
        ("interval", f"{time_text(price.low_s)} to {time_text(price.high_s)}"),
        ("exposed communication", time_text(price.exposed_s)),
        ("model FLOPs utilization", f"{price.mfu:.1%}"),
        ("memory of the first step", bytes_text(price.first_memory.peak_bytes)),
        ("memory of later steps", bytes_text(price.memory.peak_bytes)),
        ("bound by", html.escape(price.binding)),
    ]
    if titled.tokens:
        rows.append(("tokens per second", f"{titled.tokens_per_s:,.0f}"))
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table id='figures'>{cells}</table>"


def memory_picture(points: Sequence[tuple[float, int]]) -> str:
    """A step line of live bytes; of many neighbours the largest is drawn."""
    if not points:
        return "<p>no operator was priced</p>"
    per_point = -(-len(points) // _MOST_POINTS)
    shown = [
        (points[i][0], max(live for _, live in points[i : i + per_point]))
        for i in range(0, len(points), per_point)
    ]
    whole_s = max(points[-1][0], 1e-12)
    most = max(live for _, live in shown) or 1
    width, height = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 10
    line: list[str] = []
    before = None
    for time_s, live in shown:
        x, y = _LEFT + time_s / whole_s * width, 10 + (1 - live / most) * height
        line.append(f"M{x:.1f},{y:.1f}" if before is None else f"H{x:.1f}V{y:.1f}")
        before = y
    ticks = "".join(
        f'<text x="{_LEFT - 8}" y="{14 + (1 - share) * height:.0f}" text-anchor="end">'
        f"{bytes_text(most * share)}</text>"
        for share in (0.0, 0.5, 1.0)
    )
    ends = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">0</text><text x="{_WIDTH - 10}" '
        f'y="{_HEIGHT - 6}" text-anchor="end">{time_text(whole_s)}</text>'
    )
    area = f"{''.join(line)}H{_LEFT + width}V{10 + height}H{_LEFT}Z"
    return (
        f'<svg id="memory" class="memory" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f'<path d="{area}" fill="#e3ecf6" stroke="none"/>'
        f'<path d="{"".join(line)}" fill="none" stroke="#3b6ea8"/>{ticks}{ends}</svg>'
    )


def _ledger_table(ledger: Ledger) -> str:
    whole = ledger.peak_bytes or 1
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{_COLORS[kind]}"></span>{kind}</td>'
        f"<td>{bytes_text(count)}</td><td>{count / whole:.1%}</td></tr>"
        for kind, count in ledger.by_kind.items()
    )
    rows += "".join(
        f"<tr><td>{html.escape(name)} (beside)</td><td>{bytes_text(count)}</td><td></td></tr>"
        for name, count in ledger.outside_bytes.items()
    )
    where = html.escape(f"{ledger.where} {ledger.source}".strip())
    return f"<table id='ledger'>{rows}</table><p>{where}</p>"


def _largest_table(ledger: Ledger) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(each.name)}</td><td>{bytes_text(each.num_bytes)}</td>"
        f'<td>{each.kind}</td><td class="source">{html.escape(each.source)}</td></tr>'
        for each in ledger.largest
    )
    return f"<table id='largest'>{rows}</table>"

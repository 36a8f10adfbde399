"""The price of a large job as one HTML page: what `job_report` says, and pictures of when.

One file without dependencies. A layer's streams are those of `cost/overlap_picture.py`; the
pipeline has a row for each of its ranks; memory is that of the fullest rank, whose state is there
all the time and whose saved activations come and go with its micro-batches.
"""

import html
from collections.abc import Sequence
from itertools import accumulate

from plait.cost.overlap_picture import picture
from plait.dryrun.job_price import JobPrice, RankClass
from plait.dryrun.job_report import job_report, span
from plait.dryrun.legal_plans import Candidate, describe
from plait.dryrun.pipeline import PlayedTask
from plait.dryrun.pipeline_tables import Action
from plait.dryrun.report import bytes_text, time_text
from plait.dryrun.report_page import PAGE_STYLE, memory_picture

_WIDTH, _LEFT, _AXIS = 1000, 60, 26
_TALLEST = 480  # of a pipeline's picture; rows get lower as ranks get more
_SMALLEST = 0.5  # of a pixel: neighbours of a kind that are closer are drawn as one
_MOST_BOXES = 20_000
_SAVED = "saved activations"
_ACTIONS = {
    Action.FORWARD: ("forward", "#3b6ea8"),
    Action.BACKWARD: ("backward", "#4f9d69"),
    Action.BACKWARD_INPUT: ("backward, inputs", "#4f9d69"),
    Action.BACKWARD_WEIGHT: ("backward, weights", "#c9a227"),
}
_PARTS = ["#3b6ea8", "#7a5fa0", "#93b5d9", "#d1495b", "#e39aa4", "#c97b4a", "#8a8a8a", "#d8d8dc"]
_KEY_STYLE = """
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em;
            vertical-align: -.1em; }
.pipeline text { font: 12px system-ui, sans-serif; fill: #444; }
"""
_STREAMS_KEY = (
    ("products and attention", "#3b6ea8"),
    ("other compute", "#93b5d9"),
    ("messages, hidden", "#4f9d69"),
    ("messages, exposed", "#d1495b"),
)


def job_page(price: JobPrice, dollars_per_rank_hour: float | None = None) -> str:
    """Lay the price out."""
    plan = describe(Candidate(price.job.plan, price.job.micro_batch_size))
    text = html.escape(job_report(price, dollars_per_rank_hour))
    title = html.escape(f"{price.job.name} on {price.num_ranks:,} ranks of {price.cluster}")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{title}</title><style>{PAGE_STYLE}{_KEY_STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>{html.escape(plan)}</p>",
            _figures(price, dollars_per_rank_hour),
            f"<h2>The step of the busiest rank</h2>{_parts(price)}",
            "<h2>Streams of a layer</h2>",
            "<p>Messages of tp and sp; those of fsdp, dp, cp and ep are closed forms.</p>",
            _key(_STREAMS_KEY),
            f"<div id='streams'>{picture(price.timelines)}</div>",
            f"<h2>Pipeline</h2>{_pipeline(price)}",
            f"<h2>Memory over time</h2>{_memory(price)}",
            f"<h2>Memory by class of ranks</h2>{_ledgers(price.classes)}",
            f"<h2>Largest, on the fullest rank</h2>{_largest(price)}",
            f"<h2>All figures</h2><pre>{text}</pre>",
            "</body></html>",
        ]
    )


def bytes_over_time(price: JobPrice) -> list[tuple[float, int]]:
    """Seconds from the start of the pipeline, and bytes of the fullest rank from then on.

    At the most, that is its ledger: beside what is saved all kinds are taken to be there always.
    """
    fullest = price.fullest
    kept = fullest.ledger.total_bytes - fullest.ledger.bytes_by_kind[_SAVED]
    if price.run is None:
        return []
    changes: list[tuple[float, float]] = []
    tasks = price.run.tasks(fullest.pipeline_ranks[0])
    apart = {_micro_batch(each) for each in tasks if each.task.action is Action.BACKWARD_WEIGHT}
    for each in tasks:
        size = price.stage_saved_bytes[each.task.stage]
        if each.task.action is Action.FORWARD:
            changes.append((each.start_s, size))
        elif each.task.action is not Action.BACKWARD_INPUT or _micro_batch(each) not in apart:
            changes.append((each.end_s, -size))
    changes.sort()
    live = accumulate((size for _, size in changes), initial=0.0)
    times = [0.0, *(time_s for time_s, _ in changes)]
    return [(time_s, round(kept + size)) for time_s, size in zip(times, live, strict=True)]


def _micro_batch(played: PlayedTask) -> tuple[int, int]:
    return played.task.stage, played.task.micro_batch


def _figures(price: JobPrice, dollars: float | None) -> str:
    rows = [
        ("step time", time_text(price.step_s)),
        ("interval", f"{time_text(price.low_s)} to {time_text(price.high_s)}"),
        ("tokens per second", f"{price.tokens_per_s:,.0f}"),
        ("model FLOPs utilization", f"{price.mfu:.1%}"),
        ("peak memory", f"{bytes_text(price.peak_bytes)} of {_limit(price)}"),
        ("bound by", price.binding),
    ]
    if dollars is not None:
        rows.append(
            ("cost of a billion tokens", f"{price.dollars_per_billion_tokens(dollars):,.0f}")
        )
    return f"<table id='figures'>{_rows(rows)}</table>"


def _limit(price: JobPrice) -> str:
    return bytes_text(price.memory_limit_bytes)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )


def _key(entries: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<span style="background:{color}"></span>{name}' for name, color in entries)
    return f'<p class="key">{shown}</p>'


def _parts(price: JobPrice) -> str:
    """A bar of the step, and its parts in a table."""
    shares = price.parts.shares()
    whole_s = sum(seconds for _, seconds in shares) or 1.0
    bar: list[str] = []
    left = 0.0
    for (name, seconds), color in zip(shares, _PARTS, strict=True):
        width = seconds / whole_s * _WIDTH
        bar.append(
            f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="28" fill="{color}">'
            f"<title>{name}: {time_text(seconds)}</title></rect>"
        )
        left += width
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{color}"></span>{name}</td>'
        f"<td>{time_text(seconds)}</td><td>{seconds / price.step_s:.1%}</td></tr>"
        for (name, seconds), color in zip(shares, _PARTS, strict=True)
    )
    return (
        f'<svg id="parts" viewBox="0 0 {_WIDTH} 28" role="img">{"".join(bar)}</svg>'
        f"<table>{rows}</table>"
    )


def _pipeline(price: JobPrice) -> str:
    run = price.run
    if run is None or len(run.table.tasks) == 1:
        return "<p>One stage: micro-batches follow each other.</p>"
    ranks = len(run.table.tasks)
    row = min(22.0, _TALLEST / ranks)
    scale = (_WIDTH - _LEFT - 10) / run.total_s
    boxes: list[str] = []
    every = -(-ranks // 16)  # ranks between two numbers
    for rank in range(ranks):
        top = rank * row
        if rank % every == 0:
            boxes.append(
                f'<text x="{_LEFT - 8}" y="{top + row / 2 + 4:.1f}" text-anchor="end">'
                f"rank {rank}</text>"
            )
        boxes += _boxes(run.tasks(rank), scale, top, row, _MOST_BOXES // ranks)
    bottom = ranks * row
    ends = (
        f'<text x="{_LEFT}" y="{bottom + 18:.0f}">0</text><text x="{_WIDTH - 10}" '
        f'y="{bottom + 18:.0f}" text-anchor="end">{time_text(run.total_s)}</text>'
    )
    used = {task.action for tasks in run.table.tasks for task in tasks}
    key = [entry for action, entry in _ACTIONS.items() if action in used]
    note = (
        f"<p>{1 - sum(run.busy_s) / ranks / run.total_s:.1%} of the time of all ranks is waiting. "
        "The lighter, the later the stage on its rank.</p>"
    )
    height = bottom + _AXIS
    return (
        f'{_key(key)}<svg id="pipeline" class="pipeline" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'role="img">{"".join(boxes)}{ends}</svg>{note}'
    )


def _boxes(
    tasks: Sequence[PlayedTask], scale: float, top: float, row: float, most: int
) -> list[str]:
    """The tasks of a rank; of a kind and stage, those that nearly touch become one where tiny."""
    stages = sorted({each.task.stage for each in tasks})
    least = max(_SMALLEST, (_WIDTH - _LEFT) / most)
    drawn: list[tuple[Action, int, float, float, int]] = []
    for each in tasks:
        left, right = _LEFT + each.start_s * scale, _LEFT + each.end_s * scale
        last = drawn[-1] if drawn else None
        is_near = last is not None and right - last[2] < least
        if last is not None and is_near and last[0] is each.task.action:
            drawn[-1] = (*last[:3], right, last[4])
        else:
            number = each.task.micro_batch
            drawn.append((each.task.action, each.task.stage, left, right, number))
    found: list[str] = []
    for action, stage, left, right, number in drawn:
        name, color = _ACTIONS[action]
        lightness = 1 - 0.55 * stages.index(stage) / max(1, len(stages) - 1)
        found.append(
            f'<rect x="{left:.1f}" y="{top + 0.5:.1f}" width="{max(right - left - 0.2, 0.2):.1f}" '
            f'height="{row - 1:.1f}" fill="{color}" fill-opacity="{lightness:.2f}">'
            f"<title>{name}, stage {stage}, micro-batch {number}</title></rect>"
        )
    return found


def _memory(price: JobPrice) -> str:
    fullest = price.fullest
    ranks = span(fullest.pipeline_ranks)
    return (
        f"<p>Of pipeline rank {ranks}, the fullest: at most {bytes_text(price.peak_bytes)} of "
        f"{_limit(price)}. Time ends with the pipeline; the optimizer comes after it.</p>"
        f"{memory_picture(bytes_over_time(price))}"
    )


def _ledgers(classes: Sequence[RankClass]) -> str:
    kinds = list(classes[0].ledger.bytes_by_kind)
    head = "".join(f"<th>pipeline rank {span(each.pipeline_ranks)}</th>" for each in classes)
    rows = [
        [kind, *(bytes_text(each.ledger.bytes_by_kind[kind]) for each in classes)] for kind in kinds
    ]
    rows.append(["all", *(bytes_text(each.ledger.total_bytes) for each in classes)])
    rows.append(["first step", *(bytes_text(each.ledger.first_step_bytes) for each in classes)])
    if all(each.fragments is not None for each in classes):
        reserved = (each.reserved_bytes for each in classes)
        texts = ("runs out" if size is None else bytes_text(size) for size in reserved)
        rows.append(["reserved, with fragments", *texts])
    rows.append(["ranks", *(f"{each.num_ranks:,}" for each in classes)])
    rows.append(["micro-batches in flight", *(str(each.in_flight) for each in classes)])
    return (
        f"<div style='overflow-x:auto'><table id='ledger'><tr><th></th>{head}</tr>"
        f"{_rows(rows)}</table></div>"
    )


def _largest(price: JobPrice) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(each.name)}</td><td>{bytes_text(round(each.num_bytes))}</td>"
        f'<td>{each.kind}</td><td class="source">{html.escape(each.source)}</td></tr>'
        for each in price.largest
    )
    return f"<table id='largest'>{rows}</table>"

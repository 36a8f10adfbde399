"""How the price of a large job and the result of a search read, and a pipeline as a trace."""

from plait.dryrun.job_price import JobPrice, RankClass
from plait.dryrun.legal_plans import Candidate, describe
from plait.dryrun.search import SearchResult

_GIB = 2**30
_MICROSECONDS_PER_S = 1e6


def job_report(price: JobPrice, dollars_per_rank_hour: float | None = None) -> str:
    """A price for people: rates, where the time goes, memory by class of ranks, what binds."""
    job = price.job
    plan = describe(Candidate(job.plan, job.micro_batch_size, job.offload))
    lines = [
        f"{job.name} on {price.num_ranks} ranks of {price.cluster}: {plan}",
        f"step             {price.step_s:.3f} s  ({price.low_s:.3f} to {price.high_s:.3f})",
        f"tokens/s         {price.tokens_per_s:,.0f}  ({price.tokens_per_s / price.num_ranks:,.0f} "
        "a rank)",
        f"MFU              {price.mfu:.1%}  ({price.model_flops_per_s / 1e12:.0f} TFLOP/s a rank)",
        f"micro-batches    {price.num_micro_batches} of {job.micro_batch_size}",
    ]
    if dollars_per_rank_hour is not None:
        cost = price.dollars_per_billion_tokens(dollars_per_rank_hour)
        lines.append(f"cost             {cost:,.0f} for a billion tokens")
    lines += [
        f"peak memory      {price.peak_bytes / _GIB:.1f} GiB",
        f"bound by         {price.binding}",
    ]
    lines += ["", "the step of the busiest rank"]
    for name, seconds in price.parts.shares():
        lines.append(f"  {name:<30}{seconds:>10.3f} s {seconds / price.step_s:>7.1%}")
    known = [(name, seconds) for name, seconds in price.sources if seconds]
    if known:
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in known)
        lines += ["", f"times come from: {times}"]
    lines += ["", "memory by class of ranks [GiB]"]
    for each in price.classes:
        ranks = span(each.pipeline_ranks)
        lines.append(
            f"  pipeline rank {ranks}: {each.num_ranks} ranks, {each.in_flight} micro-batches in "
            f"flight, {each.ledger.total_bytes / _GIB:.1f} (first step "
            f"{each.ledger.first_step_bytes / _GIB:.1f})"
        )
        kinds = sorted(each.ledger.bytes_by_kind.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {size / _GIB:.1f}" for kind, size in kinds)
        lines.append(f"    {parts}")
        if each.fragments is not None:
            lines.append(f"    {reserved_text(each)}")
    if price.largest:
        lines += ["", "what holds the fullest rank's memory"]
        lines += [f"  {each}" for each in price.largest]
    if price.notes:
        lines += ["", *price.notes]
    return "\n".join(lines)


def reserved_text(each: RankClass) -> str:
    """What the allocator reserves on a rank of a class, in words."""
    assert each.fragments is not None
    fixed, grown = (
        (found.peak_bytes + each.ledger.outside_bytes) / _GIB if found.fits else None
        for found in (each.fragments.fixed, each.fragments.expandable)
    )
    if fixed is None and grown is None:
        return "the allocator runs out of memory"
    if fixed is None:
        return f"the allocator runs out of memory; with segments that grow it reserves {grown:.1f}"
    text = f"reserved with fragments {fixed:.1f}"
    return text if grown is None else f"{text}, with segments that grow {grown:.1f}"


def search_report(result: SearchResult) -> str:
    """The best plans, and for each reason how many plans it ruled out."""
    whole = "" if result.is_complete else " (stopped early)"
    lines = [
        f"{result.num_candidates:,} legal plans; {result.num_priced:,}, with variants of the best, "
        f"fit {result.limit_bytes / _GIB:.1f} GiB and are priced{whole}",
        "",
        f"    {'step':>9}    {'MFU':>6}  {'rate':>17}  {'memory':>10}  plan",
    ]
    lines += [f"{i:>3} {each.line()}" for i, each in enumerate(result.best, start=1)]
    if result.rejected:
        lines += ["", "rejected"]
    for reason, count in result.rejected.most_common():
        lines.append(f"{count:>7,}  {reason}; one: {result.examples[reason]}")
    if result.not_tried:
        lines += ["", "not tried", *(f"  {each}" for each in result.not_tried)]
    if result.best:
        lines += ["", f"the best is bound by {result.best[0].price.binding}"]
    return "\n".join(lines)


def search_json(result: SearchResult, explain: tuple[int, int] | None = None) -> dict[str, object]:
    """A search for JSON. explain: two of the best (from 1), compared in words."""
    found: dict[str, object] = {
        "job": result.job.name,
        "num_candidates": result.num_candidates,
        "num_priced": result.num_priced,
        "memory_limit_bytes": result.limit_bytes,
        "is_complete": result.is_complete,
        "best": [{**each.price.to_dict(), "is_exact": each.is_exact} for each in result.best],
        "rejected": [
            {"reason": reason, "count": count, "example": result.examples[reason]}
            for reason, count in result.rejected.most_common()
        ],
        "not_tried": list(result.not_tried),
    }
    return found if explain is None else found | {"explanation": result.explain(*explain)}


def pipeline_trace(price: JobPrice) -> dict[str, object]:
    """The pipeline as a Chrome trace, a row for each pipeline rank, for ui.perfetto.dev."""
    events: list[dict[str, object]] = []
    if price.run is not None:
        for rank in range(len(price.run.table.tasks)):
            name = {"name": f"pipeline rank {rank}"}
            events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": name})
            for each in price.run.tasks(rank):
                task = each.task
                events.append(
                    {
                        "name": f"{task.action.value} stage {task.stage} #{task.micro_batch}",
                        "cat": task.action.name.lower(),
                        "ph": "X",
                        "pid": 0,
                        "tid": rank,
                        "ts": round(each.start_s * _MICROSECONDS_PER_S, 3),
                        "dur": round((each.end_s - each.start_s) * _MICROSECONDS_PER_S, 3),
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def span(ranks: tuple[int, ...]) -> str:
    """Numbers of ranks in a few words."""
    if len(ranks) == 1:
        return str(ranks[0])
    if ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))

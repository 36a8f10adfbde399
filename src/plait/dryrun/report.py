"""A price as text and as JSON: the result first, then what it is made of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from plait.dryrun.memory import Ledger
from plait.dryrun.price import Price
from plait.errors import PlanError

_MIB, _GIB = 2**20, 2**30
_NUM_OPERATORS = 8
_LEAST_S = 1e-9


@dataclass(frozen=True, kw_only=True)
class Titled:
    """A price and what it is the price of.

    tokens: of one step, on all ranks; 0 where there is no such thing. dollars_per_rank_hour: what a
    rank costs, if the report is to say what tokens do. Raises PlanError if there are none.
    """

    title: str
    price: Price
    num_ranks: int = 1
    tokens: int = 0
    dollars_per_rank_hour: float | None = None

    def __post_init__(self) -> None:
        """Check that there are tokens to have a cost."""
        if self.dollars_per_rank_hour is not None and not self.tokens:
            raise PlanError(
                "dollars_per_rank_hour asks what tokens cost, and the tokens of a step are not "
                "known. Give tokens, of all ranks together, or leave the price out."
            )

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.price.step_s if self.price.step_s else 0.0

    @property
    def dollars_per_billion_tokens(self) -> float | None:
        """What a billion tokens cost; None without a price of a rank."""
        if self.dollars_per_rank_hour is None:
            return None
        step_dollars = self.price.step_s / 3600 * self.num_ranks * self.dollars_per_rank_hour
        return 1e9 / self.tokens * step_dollars


def bytes_text(num_bytes: float) -> str:
    """Bytes in GiB or MiB, as people compare them with a device's memory."""
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.2f} GiB"
    return f"{num_bytes / _MIB:.2f} MiB"


def time_text(seconds: float) -> str:
    """Seconds in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def to_text(titled: Titled) -> str:
    """Lay it out in aligned lines."""
    price = titled.price
    lines = [titled.title, *_rows(_headline(titled)), ""]
    lines += ["what the step is made of", *_rows(_parts(price)), ""]
    lines += ["memory at the peak of a later step", *_rows(_kinds(price.memory)), ""]
    lines += _moment(price.memory)
    lines += ["largest at the peak"]
    lines += [
        f"  {bytes_text(each.num_bytes):>12}  {each.kind:<18} {each.name}  {each.source}".rstrip()
        for each in price.memory.largest[:_NUM_OPERATORS]
    ]
    lines += ["", "operators, by time"]
    for total in price.timeline.totals()[:_NUM_OPERATORS]:
        if total.duration_s:
            lines.append(
                f"  {time_text(total.duration_s):>12}  {total.num_events:>6} x  {total.operator}"
            )
    lines += ["", "where the times come from", *_rows(_sources(price))]
    lines += [f"warning: {each}" for each in price.warnings]
    return "\n".join(lines)


def to_json(titled: Titled) -> str:
    """Every figure, in SI units and bytes."""
    price = titled.price
    data = {
        "title": titled.title,
        "cluster": price.cluster,
        "num_ranks": titled.num_ranks,
        "step_s": price.step_s,
        "low_s": price.low_s,
        "high_s": price.high_s,
        "tokens": titled.tokens,
        "tokens_per_s": titled.tokens_per_s,
        "mfu": price.mfu,
        "flops": price.flops,
        "recomputed_flops": price.recomputed_flops,
        "compute_s": price.compute_s,
        "communication_s": price.communication_s,
        "exposed_s": price.exposed_s,
        "binding": price.binding,
        "parts_s": dict(price.parts_s),
        "memory_limit_bytes": price.memory_limit_bytes,
        "fits": price.fits,
        "programs_s": dict(price.programs_s),
        "num_micro_batches": price.num_micro_batches,
        "saved_bytes": price.saved_bytes,
        "memory": _ledger(price.memory),
        "first_memory": _ledger(price.first_memory),
        **price.timeline.figures(),
        "sources": {
            source.value: {"num_operators": share.num_operators, "seconds": share.seconds}
            for source, share in price.sources.items()
        },
        "warnings": list(price.warnings),
    }
    cost = titled.dollars_per_billion_tokens
    return json.dumps(data if cost is None else data | {"dollars_per_billion_tokens": cost})


def _headline(titled: Titled) -> dict[str, str]:
    price = titled.price
    interval = f"{time_text(price.low_s)} to {time_text(price.high_s)}"
    rows = {"step time": f"{time_text(price.step_s)}  ({interval})"}
    if titled.tokens:
        low, high = (
            titled.tokens / max(price.high_s, _LEAST_S),
            titled.tokens / max(price.low_s, _LEAST_S),
        )
        rows["tokens per second"] = (
            f"{titled.tokens_per_s:,.0f}  ({low:,.0f} to {high:,.0f}) on {titled.num_ranks} ranks"
        )
    cost = titled.dollars_per_billion_tokens
    if cost is not None:
        rows["cost"] = f"{cost:,.2f} for a billion tokens"
    shares = [price.mfu * price.step_s / max(t, _LEAST_S) for t in (price.high_s, price.low_s)]
    rows["model FLOPs utilization"] = f"{price.mfu:.1%}  ({shares[0]:.1%} to {shares[1]:.1%})"
    rows["arithmetic of a rank"] = f"{price.flops / 1e12:.3f} TFLOP"
    if price.recomputed_flops:
        rows["computed again"] = f"{price.recomputed_flops / 1e12:.3f} TFLOP"
    rows["compute"] = time_text(price.compute_s)
    rows["communication"] = time_text(price.communication_s)
    rows["exposed communication"] = time_text(price.exposed_s)
    rows["memory, first step"] = bytes_text(price.first_memory.peak_bytes)
    rows["memory, later steps"] = bytes_text(price.memory.peak_bytes)
    memory = price.memory
    if memory.reserved is not None and memory.outside_bytes:
        rows["with fragments"] = bytes_text(memory.reserved.peak_bytes)
        assert memory.expandable is not None
        rows["with expandable segments"] = bytes_text(memory.expandable.peak_bytes)
    if price.memory_limit_bytes is not None:
        rows["of the device"] = (
            f"{bytes_text(memory.total_bytes)} of {bytes_text(price.memory_limit_bytes)}: "
            f"{'fits' if price.fits else 'does not fit'}"
        )
    rows["bound by"] = price.binding
    return rows


def _parts(price: Price) -> dict[str, str]:
    return {
        name: f"{time_text(seconds):>12} {seconds / max(price.step_s, _LEAST_S):>7.1%}"
        for name, seconds in price.parts_s.items()
        if seconds
    }


def _kinds(ledger: Ledger) -> dict[str, str]:
    rows = {kind.value: f"{bytes_text(count):>12}" for kind, count in ledger.by_kind.items()}
    rows |= {name: f"{bytes_text(count):>12}" for name, count in ledger.outside_bytes.items()}
    return rows


def _moment(ledger: Ledger) -> list[str]:
    if not ledger.where:
        return []
    found = [f"the peak is at {ledger.where}"]
    return [*found, *([f"  {ledger.source}"] if ledger.source else []), ""]


def _sources(price: Price) -> dict[str, str]:
    return {
        source.value: f"{share.num_operators:>8} operators  {time_text(share.seconds):>12}"
        for source, share in price.sources.items()
    }


def _rows(rows: Mapping[str, str]) -> list[str]:
    width = max((len(name) for name in rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def _ledger(ledger: Ledger) -> dict[str, object]:
    reserved, expandable = ledger.reserved, ledger.expandable
    return {
        "peak_bytes": ledger.peak_bytes,
        "by_kind": {kind.value: count for kind, count in ledger.by_kind.items()},
        "where": ledger.where,
        "source": ledger.source,
        "reserved_bytes": None if reserved is None else reserved.peak_bytes,
        "expandable_bytes": None if expandable is None else expandable.peak_bytes,
        "outside_bytes": dict(ledger.outside_bytes),
        "largest": [
            {
                "name": each.name,
                "num_bytes": each.num_bytes,
                "kind": each.kind.value,
                "operator": each.operator,
                "source": each.source,
            }
            for each in ledger.largest
        ],
    }

"""`search`: the plans of a job on a cluster, priced, the best first, and why the others are not.

Plans are enumerated (`legal_plans.py`), pruned by the least memory of their parameters, then by the
ledger of every rank class, and priced. Pieces are captured and timed once for all plans that share
them. A share of a sequence (cp) takes captures of its own, so such plans are known by a bound until
they are among the best. The best are priced again with the whole pipeline, with replicas, without
sp, and with half of a full recompute, and kept if their ranks have room for the allocator's
fragments too.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from plait.collector import collector_paused
from plait.cost.clusters import Cluster
from plait.cost.nccl_tests import Measured
from plait.cost.table import Table
from plait.dryrun.job_memory import least_bytes
from plait.dryrun.job_price import JobPrice, RankClass, missing
from plait.dryrun.legal_plans import (
    MICRO_BATCH_SIZES,
    Candidate,
    Choices,
    Rejected,
    candidates,
    describe,
)
from plait.dryrun.model_source import ModelSource
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import Pricer, shape_of, source_of, with_plan
from plait.dryrun.stages import stages_of
from plait.errors import GraphError, PlanError
from plait.plan.parallel_plan import Recompute

_GIB = 2**30
_REPLICAS = (2, 3, 4)
_MOST_SPLIT = 3  # kinds of pieces made with replicas, which take seconds each
_OFFLOAD_STEPS = 20  # shares of the activations that may be offloaded: twentieths
_TELL_EVERY, _TELL_EVERY_S = 25, 1.0
OnProgress = Callable[[str], None]
FIXABLE = (
    *("dp", "fsdp", "cp", "tp", "pp", "ep"),
    *("recompute", "pipeline", "stages_per_rank", "reshard"),
)
"""Fields of a plan that a search tries, and so can be told to leave at a value."""


@dataclass(frozen=True)
class Priced:
    """A plan and its price.

    is_exact: played in full, its shares of sequences captured. Else it is an estimate, and with cp
    one from below.
    """

    candidate: Candidate
    price: JobPrice
    is_exact: bool = True

    def line(self) -> str:
        """In a line: step, MFU, memory, plan."""
        price = self.price
        return (
            f"{price.step_s:9.3f} s  {price.mfu:6.1%}  {price.tokens_per_s / 1e6:8.3f} M tokens/s  "
            f"{price.peak_bytes / _GIB:6.1f} GiB  {describe(self.candidate)}"
            f"{'' if self.is_exact else ' (estimated)'}"
        )


@dataclass
class SearchResult:
    """What a search found; `best` is in order. rejected: by reason, how many and an example.

    nearest: what the plan that came nearest to the limit needs, and which it is. not_tried: classes
    of plans that the search leaves out, and why.
    """

    job: PretrainJob
    limit_bytes: int
    best: list[Priced] = field(default_factory=list)
    num_candidates: int = 0
    num_priced: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    nearest: tuple[int, str] | None = None
    not_tried: list[str] = field(default_factory=list)
    is_complete: bool = False

    def reject(self, reason: str, example: str) -> None:
        """Count a refusal."""
        self.rejected[reason] += 1
        self.examples.setdefault(reason, example)

    def explain(self, first: int, second: int) -> str:
        """Say why one of the best (from 1) is priced below another, part by part."""
        a, b = self._numbered(first), self._numbered(second)
        lines = [
            f"{first}: {describe(a.candidate)}",
            f"{second}: {describe(b.candidate)}",
            f"{'':<32}{first:>12}{second:>12}{'difference':>14}",
            _row("step [s]", a.price.step_s, b.price.step_s),
        ]
        others = dict(b.price.parts.shares())
        for name, seconds in sorted(
            a.price.parts.shares(), key=lambda part: -abs(others[part[0]] - part[1])
        ):
            lines.append(_row(f"  {name} [s]", seconds, others[name]))
        mine, theirs = (each.price.fullest.ledger.bytes_by_kind for each in (a, b))
        lines.append(_row("memory [GiB]", a.price.peak_bytes / _GIB, b.price.peak_bytes / _GIB))
        for kind in mine:
            lines.append(_row(f"  {kind} [GiB]", mine[kind] / _GIB, theirs[kind] / _GIB))
        return "\n".join(lines)

    def _numbered(self, number: int) -> Priced:
        if not 1 <= number <= len(self.best):
            raise PlanError(f"--explain {number}: the plans are 1 to {len(self.best)}.")
        return self.best[number - 1]


@collector_paused()
def search(
    job: PretrainJob,
    cluster: Cluster,
    *,
    memory_bytes: int | None = None,
    source: ModelSource | None = None,
    top: int = 10,
    micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES,
    fixed: Mapping[str, object] = MappingProxyType({}),
    measured: Sequence[Measured] = (),
    table: Table | None = None,
    can_offload: bool = False,
    on_progress: OnProgress = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Search the plans of a job. memory_bytes: of a rank, by default all that the device has.

    fixed: fields of the plan (of `FIXABLE`) that a plan must have, with their values; the others of
    the job's own plan have no say. measured: runs of nccl-tests, which go before the model of a
    message, and table: what `plait calibrate` measured of the device, both as in `price_job`.
    can_offload: a plan that lacks memory may keep the least share of its activations in the host's
    memory with which it fits; others have the offload of the job, for it makes no plan faster.

    should_stop is asked before each plan. It, or a KeyboardInterrupt, ends the search; what was
    found so far is returned, with is_complete False. Raises PlanError with what is missing if no
    plan fits, for more memory than the device has and for a field that cannot be fixed.
    """
    found = source or source_of(job)
    limit = memory_bytes or cluster.device.memory_bytes
    if limit > cluster.device.memory_bytes:
        raise PlanError(
            f"a rank may use {limit / _GIB:.1f} GiB, but {cluster.device.name} has "
            f"{cluster.device.memory_bytes / _GIB:.1f}."
        )
    for name in fixed:
        if name not in FIXABLE:
            raise PlanError(
                f"plan.{name} cannot be fixed in a search. What can: {', '.join(FIXABLE)}."
            )
    result = SearchResult(job, limit)
    hunt = _Search(job, cluster, found, result, on_progress, measured, table)
    hunt.fixed = fixed
    hunt.micro_batch_sizes, hunt.should_stop = micro_batch_sizes, should_stop
    hunt.can_offload = can_offload
    try:
        hunt.run()
        hunt.refine(top)
        hunt.keep_fitting(top)
        result.is_complete = True
    except KeyboardInterrupt:
        if not result.best:
            raise PlanError("stopped before any plan was priced.") from None
        on_progress("stopped; the best so far:")
    result.best.sort(key=lambda each: each.price.step_s)
    del result.best[top:]
    if not result.best:
        raise PlanError(_nothing(result, cluster, can_offload))
    return result


class _Search:
    def __init__(
        self,
        job: PretrainJob,
        cluster: Cluster,
        source: ModelSource,
        result: SearchResult,
        on_progress: OnProgress,
        measured: Sequence[Measured],
        table: Table | None,
    ) -> None:
        self.job, self.cluster, self.source, self.result = job, cluster, source, result
        self.on_progress = on_progress
        self.micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES
        self.should_stop: Callable[[], bool] = lambda: False
        self.can_offload = False
        self.fixed: Mapping[str, object] = {}
        limited = replace(cluster, device=replace(cluster.device, memory_bytes=result.limit_bytes))
        self.pricer = Pricer(job, limited, source, measured, table)
        # What a table knows are real sizes: a share of a larger cost is no bound there.
        self.quick = self.pricer if table is not None else self.pricer.lower_bounds()
        self.elements: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
        self.told_s = 0.0

    def run(self) -> None:
        """Price every candidate that fits, in groups that share pieces."""
        self.on_progress(f"plans of {self.job.name} on {self.cluster.num_ranks:,} ranks")
        choices = Choices(micro_batch_sizes=self.micro_batch_sizes).with_fixed(self.fixed)
        self.result.not_tried = choices.not_tried(self.source)
        seen = candidates(
            self.job,
            self.source,
            self.cluster.num_ranks,
            ranks_per_node=self.cluster.ranks_per_node,
            choices=choices,
        )
        legal: list[Candidate] = []
        for each in seen:
            if isinstance(each, Rejected):
                self.result.reject(each.reason, each.example)
            elif (other := self._not_as_fixed(each)) is not None:
                self.result.reject(other, describe(each))
            else:
                legal.append(each)
        self.result.num_candidates = len(legal)
        kept = [each for each in legal if self._least_fits(each)]
        self.on_progress(f"{len(legal):,} legal plans, {len(kept):,} whose parameters fit")
        kept.sort(key=_sharing)
        for number, each in enumerate(kept, start=1):
            self._price(each)
            if number % _TELL_EVERY == 0 and (
                number == _TELL_EVERY or time.perf_counter() - self.told_s > _TELL_EVERY_S
            ):
                self._tell(number, len(kept))

    def _not_as_fixed(self, candidate: Candidate) -> str | None:
        """Say which fixed field has another value."""
        for name, value in self.fixed.items():
            if getattr(candidate.plan, name) != value:
                return f"not {name}={getattr(value, 'value', value)}, which is fixed"
        return None

    def _tell(self, number: int, total: int) -> None:
        self.told_s = time.perf_counter()
        best = min(self.result.best, key=lambda each: each.price.step_s, default=None)
        text = f"{number:,} of {total:,} plans"
        self.on_progress(text if best is None else f"{text}, best {best.price.step_s:.3f} s")

    def _least_fits(self, candidate: Candidate) -> bool:
        plan = candidate.plan
        key = plan.tp, plan.pp, plan.stages_per_rank
        try:
            if key not in self.elements:
                self.elements[key] = self._elements(candidate)
        except PlanError as error:
            self.result.reject(str(error), describe(candidate))
            return False
        least = least_bytes(self.elements[key], self.job, plan, self.cluster.device)
        if least <= self.result.limit_bytes:
            return True
        self.result.reject(
            "parameters, gradients and optimizer alone exceed the memory", describe(candidate)
        )
        self._near(least, candidate)
        return False

    def _elements(self, candidate: Candidate) -> list[tuple[float, float]]:
        """Elements and expert elements of each rank of a pipeline."""
        plan = candidate.plan
        shape = shape_of(replace(self.job, plan=plan))
        pieces = self.pricer.store.find(replace(shape, recompute=Recompute.NONE))
        by_name = {"before": pieces.before, "behind": pieces.behind, **pieces.layers}
        stages = stages_of(self.source, plan.pp * plan.stages_per_rank)
        found = [(0.0, 0.0)] * plan.pp
        for i, stage in enumerate(stages):
            for name, count in stage:
                piece = by_name[name]
                own, experts = found[i % plan.pp]
                found[i % plan.pp] = (
                    own + count * piece.num_elements,
                    experts + count * piece.num_expert_elements,
                )
        return found

    def _price(self, candidate: Candidate) -> None:
        self._check_stop()
        try:
            planned = self.quick.planned(self._job(candidate))
            if self.can_offload:
                share = least_offload(
                    planned.classes(), self.result.limit_bytes, offload=candidate.offload
                )
                if share > candidate.offload:
                    candidate = replace(candidate, offload=share)
                    planned = self.quick.planned(self._job(candidate))
            fullest = max(planned.classes(), key=lambda each: each.ledger.total_bytes)
            needed = fullest.ledger.total_bytes
            if needed > self.result.limit_bytes:
                kind = fullest.ledger.largest()
                reason = f"the ledger exceeds the memory, most of it {kind}"
                self.result.reject(reason, describe(candidate))
                self._near(needed, candidate, missing(fullest, self.result.limit_bytes))
                return
            price = planned.price()
        except (PlanError, GraphError) as error:
            self.result.reject(str(error).split(". ")[0], describe(candidate))
            return
        self.result.num_priced += 1
        self.result.best.append(Priced(candidate, replace(price, run=None), is_exact=False))

    def _near(self, needed: int, candidate: Candidate, text: str = "") -> None:
        if self.result.nearest is None or needed < self.result.nearest[0]:
            self.result.nearest = needed, f"{describe(candidate)}{': ' if text else ''}{text}"

    def refine(self, top: int) -> None:
        """Price the best again, exactly, and with what only they are tried with."""
        self.on_progress(f"the best {top} exactly, and variants of them")
        exact = self._cheapest(top)
        made: set[tuple[object, ...]] = set()
        for each in exact:
            candidate = each.candidate
            plan, size = candidate.plan, candidate.micro_batch_size
            if plan.recompute is Recompute.FULL and "recompute" not in self.fixed:
                half = replace(plan, recompute=Recompute.ALTERNATE)
                self._add_variant(replace(candidate, plan=half))
            kind = plan.tp, plan.cp, plan.recompute, size
            if plan.tp == 1 or (kind not in made and len(made) == _MOST_SPLIT):
                continue
            if kind not in made:
                self.on_progress(f"replicas of tp={plan.tp}, micro-batch {size}")
            made.add(kind)
            for variant in _variants(candidate):
                self._add_variant(variant)

    def _add_variant(self, variant: Candidate) -> None:
        self._add_exact(variant, _what(variant))

    def _cheapest(self, count: int) -> list[Priced]:
        """The best so many plans, each priced exactly, at the head of what was found."""
        best = self.result.best
        while True:
            best.sort(key=lambda each: each.price.step_s)
            unsure = next((i for i, each in enumerate(best[:count]) if not each.is_exact), None)
            if unsure is None:
                return best[:count]
            self._add_exact(best[unsure].candidate)
            del best[unsure]
            self.result.num_priced -= 1

    def _add_exact(self, candidate: Candidate, what: str = "") -> None:
        """Price a plan exactly and keep it if it fits. what: the variant that it is, in words."""
        reason = f"{what}: " if what else ""
        try:
            price = self._exact(candidate)
            if not price.fits and self.can_offload:
                share = least_offload(
                    price.classes, self.result.limit_bytes, offload=candidate.offload
                )
                candidate = replace(candidate, offload=share)
                price = self._exact(candidate)
        except (PlanError, GraphError) as error:
            self.result.reject(f"{reason}{str(error).split('. ')[0]}", describe(candidate))
            return
        if not price.fits:
            reason += "the ledger exceeds the memory"
            if not what:
                reason += f", most of it {price.fullest.ledger.largest()}"
                self._near(price.peak_bytes, candidate, price.missing())
            self.result.reject(reason, describe(candidate))
            return
        self.result.best.append(Priced(candidate, price))
        self.result.num_priced += 1

    def keep_fitting(self, top: int) -> None:
        """Keep the best plans whose ranks also have room for what the allocator wastes."""
        self.on_progress("what the allocator reserves for the best")
        kept: list[Priced] = []
        try:
            while len(kept) < top and (found := self._cheapest(1)):
                fitting = self._fitting(found[0])
                del self.result.best[0]
                if fitting is not None:
                    kept.append(fitting)
        except KeyboardInterrupt:
            self.result.best += kept
            raise
        self.result.best = kept

    def _fitting(self, each: Priced) -> Priced | None:
        """The plan, with more offloaded if need be, if its ranks have room for fragments too."""
        self._check_stop()
        candidate, price = each.candidate, self._with_fragments(each.candidate, each.price)
        while self.can_offload and not price.fits and candidate.offload < 1:
            # The least share that the ledger asks for leaves the allocator no room.
            more = min(1.0, round(candidate.offload + 1 / _OFFLOAD_STEPS, 2))
            candidate = replace(candidate, offload=more)
            price = self._with_fragments(candidate, each.price)
        if price.fits:
            if candidate is not each.candidate:
                price = replace(self._exact(candidate), classes=price.classes)
            return Priced(candidate, price)
        reason = "the allocator's fragments exceed the memory"
        self.result.reject(reason, describe(each.candidate))
        self._near(max(x.asked_bytes for x in price.classes), each.candidate, price.missing())
        return None

    def _with_fragments(self, candidate: Candidate, price: JobPrice) -> JobPrice:
        planned = self.pricer.planned(self._job(candidate))
        return replace(price, classes=planned.with_fragments(while_they_fit=True))

    def _check_stop(self) -> None:
        if self.should_stop():
            raise KeyboardInterrupt

    def _exact(self, candidate: Candidate) -> JobPrice:
        self._check_stop()
        price = self.pricer.price(self._job(candidate), fragments=False)
        if not candidate.offload:
            return price
        note = f"{candidate.offload:.0%} of the saved activations wait in the host's memory"
        return replace(price, notes=(*price.notes, f"{note} (offload={candidate.offload:g})"))

    def _job(self, candidate: Candidate) -> PretrainJob:
        job = with_plan(self.job, candidate.plan, candidate.micro_batch_size)
        return replace(job, offload=candidate.offload)


def least_offload(classes: Sequence[RankClass], limit_bytes: int, *, offload: float) -> float:
    """The least share of saved activations in the host's memory with which every rank fits.

    classes: of the job as it is, with a share `offload` there already, which is returned where they
    fit. In twentieths, rounded up; 1 where even that is not enough.
    """
    share = offload
    for each in classes:
        lack = each.ledger.total_bytes - limit_bytes
        kept = each.ledger.bytes_by_kind["saved activations"]
        if lack >= kept and lack > 0:
            return 1.0
        if lack > 0:
            share = max(share, offload + (1 - offload) * lack / kept)
    if share == offload:
        return offload
    return math.ceil(share * _OFFLOAD_STEPS) / _OFFLOAD_STEPS


def _variants(candidate: Candidate) -> Iterator[Candidate]:
    """What is tried of the best plans only, as it takes captures of its own."""
    plan = candidate.plan
    for replicas in _REPLICAS:
        yield replace(candidate, plan=replace(plan, replicas=replicas))
    if plan.sp and plan.num_expert_ranks // plan.tp % plan.ep == 0:
        yield replace(candidate, plan=replace(plan, sp=False))


def _what(variant: Candidate) -> str:
    """What a variant has that no plan before has, in words."""
    plan = variant.plan
    if plan.recompute is Recompute.ALTERNATE:
        return "recompute alternate"
    return "replicas" if plan.replicas != 1 else "without sp"


def _sharing(candidate: Candidate) -> tuple[object, ...]:
    """Plans that share captures, tables and runs of a pipeline stand together; small ones first."""
    plan = candidate.plan
    order = list(Recompute).index(plan.recompute)
    shares = -plan.tp, candidate.micro_batch_size, plan.cp, order
    return (*shares, plan.pp, plan.pipeline, plan.stages_per_rank, plan.ep)


def _row(name: str, a: float, b: float) -> str:
    return f"{name:<32}{a:>12.3f}{b:>12.3f}{b - a:>+14.3f}"


def _nothing(result: SearchResult, cluster: Cluster, can_offload: bool) -> str:
    limit = result.limit_bytes / _GIB
    text = (
        f"no plan of {result.job.name} fits {cluster.num_ranks} ranks of {cluster.name} with "
        f"{limit:.1f} GiB each."
    )
    if result.nearest is None:
        reasons = "; ".join(
            f"{reason} ({count})" for reason, count in result.rejected.most_common(3)
        )
        return f"{text} Reasons: {reasons}."
    needed, example = result.nearest
    return (
        f"{text} The nearest needs at least {needed / _GIB:.1f} GiB, "
        f"{needed / _GIB - limit:.1f} more: {example}. Take more ranks, or devices with more memory"
        f"{'' if can_offload else ', or let plans offload (--offload)'}."
    )

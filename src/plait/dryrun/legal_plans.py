"""Every plan that a job could have on a world, and why the others cannot be.

A plan is refused as early as its numbers allow: by what does not divide, by the least memory that
its parameters need, and at last by the ledger (`search.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.dryrun.model_source import ModelSource
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.stages import check_model, spread_of
from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute

MICRO_BATCH_SIZES = (1, 2, 4)
_POLICIES = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
_MANY_STAGES = (2, 4, 8)
_LEAST_TOKENS = 1024  # of a rank of cp; below it attention's ring is all latency
_FEWEST_ROUNDS = 1  # micro-batches over pipeline ranks, below which most of the time is bubble


@dataclass(frozen=True)
class Candidate:
    """A legal plan, with sequences in a micro-batch.

    offload: share of the saved activations that waits in the host's memory.
    """

    plan: ParallelPlan
    micro_batch_size: int
    offload: float = 0.0


@dataclass(frozen=True)
class Rejected:
    """Plans that cannot be, in words, and one of them."""

    reason: str
    example: str


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What every mesh is tried with.

    many_stages: on a rank, of schedules that have several. pipeline: one that is wanted though it
    would be left out (GPipe, or DualPipeV of a model without experts).
    """

    micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES
    policies: Sequence[Recompute] = _POLICIES
    many_stages: Sequence[int] = _MANY_STAGES
    pipeline: Pipeline | None = None

    def with_fixed(self, fixed: Mapping[str, object]) -> "Choices":
        """With what fields of a plan are fixed at."""
        policy, pipeline = fixed.get("recompute"), fixed.get("pipeline")
        stages = fixed.get("stages_per_rank", 1)
        found = self
        if policy is not None and policy not in self.policies:
            found = replace(found, policies=(*self.policies, Recompute(str(policy))))
        if isinstance(stages, int) and stages not in (1, *self.many_stages):
            found = replace(found, many_stages=(*self.many_stages, stages))
        return replace(found, pipeline=None if pipeline is None else Pipeline(str(pipeline)))

    def not_tried(self, source: ModelSource) -> list[str]:
        """Classes of plans that are left out, why, and the setting that tries them."""
        found: list[str] = []
        if len(self.micro_batch_sizes) > 1:
            largest = max(self.micro_batch_sizes)
            found.append(
                f"micro-batches of more than {largest} sequences hold more and leave a pipeline "
                f"fewer of them (--set micro_batch_size={2 * largest})"
            )
        if self.pipeline is not Pipeline.GPIPE:
            found.append(
                "GPipe takes as long as 1F1B and holds all micro-batches "
                "(--set plan.pipeline=gpipe)"
            )
        if not source.num_experts and self.pipeline is not Pipeline.DUAL_PIPE_V:
            found.append(
                "DualPipeV hides exchanges of experts, and the model has none "
                "(--set plan.pipeline=dualpipev)"
            )
        most = max(self.many_stages)
        found.append(
            f"more than {most} stages on a rank send more (--set plan.stages_per_rank={2 * most})"
        )
        if Recompute.ALTERNATE not in self.policies:
            found.append(
                "recompute alternate is tried for the best plans that recompute all "
                "(--set plan.recompute=alternate)"
            )
        return found


DEFAULT_CHOICES = Choices()


def candidates(
    job: PretrainJob,
    source: ModelSource,
    world: int,
    *,
    ranks_per_node: int,
    choices: Choices = DEFAULT_CHOICES,
) -> Iterator[Candidate | Rejected]:
    """Legal plans of a job on a world, and the refusals met on the way.

    tp stays inside a node; sp goes with tp; pipeline schedules as many stages as there are layers
    for. Offload is that of the job. What is left to the search: more offload where memory lacks,
    and on the best plans replicas, tp without sp, and recompute "alternate".
    """
    for tp in _divisors(min(world, ranks_per_node)):
        wrong = [f"{name}={count}" for name, count in source.counts.items() if count % tp]
        if wrong:
            yield Rejected(f"tp does not divide {', '.join(wrong)}", f"tp={tp}")
            continue
        for cp in _divisors(world // tp):
            if cp > 1 and job.sequence_length // cp < _LEAST_TOKENS:
                yield Rejected(f"cp leaves a rank fewer than {_LEAST_TOKENS} tokens", f"cp={cp}")
                break
            for pp in _divisors(world // tp // cp):
                plan = ParallelPlan(tp=tp, cp=cp, pp=1)
                yield from _with_pipeline(job, source, world, plan, pp, choices)


def _with_pipeline(
    job: PretrainJob,
    source: ModelSource,
    world: int,
    plan: ParallelPlan,
    pp: int,
    choices: Choices,
) -> Iterator[Candidate | Rejected]:
    plan = replace(plan, pp=pp)
    shards = world // plan.num_ranks
    if plan.pp > source.num_layers + 2:
        yield Rejected("more stages than layers", f"pp={plan.pp}")
        return
    for fsdp in _divisors(shards):
        if fsdp == 1 and shards > 1 and job.optimizer_bytes:
            yield Rejected("fsdp=1 with dp above 1 copies the optimizer", f"dp={shards}")
            continue
        sized = replace(plan, fsdp=fsdp, dp=shards // fsdp, sp=plan.tp > 1)
        for micro_batch_size in choices.micro_batch_sizes:
            tried = replace(job, plan=sized, micro_batch_size=micro_batch_size)
            try:
                spread = spread_of(tried, sized, world)
                check_model(source, sized)
            except PlanError as error:
                yield Rejected(_short(error), f"{_sizes(sized)}, micro-batch {micro_batch_size}")
                continue
            if plan.pp > 1 and spread.num_micro_batches < _FEWEST_ROUNDS * plan.pp:
                yield Rejected(
                    "fewer micro-batches than pipeline ranks",
                    f"{_sizes(sized)}, {spread.num_micro_batches} micro-batches",
                )
                continue
            for order in _orders(source, sized, spread.num_micro_batches, choices):
                for ep in _experts(source, order):
                    for policy in choices.policies:
                        found = replace(order, ep=ep, recompute=policy)
                        yield Candidate(found, micro_batch_size, job.offload)


def _orders(
    source: ModelSource, plan: ParallelPlan, count: int, choices: Choices
) -> Iterator[ParallelPlan]:
    """The schedules that a pipeline can have, and for fsdp when parameters are gathered."""
    if plan.pp == 1:
        yield plan
        if plan.fsdp > 1:
            yield replace(plan, reshard=True)
        return
    room = source.num_layers + 2
    yield plan
    if choices.pipeline is Pipeline.GPIPE:
        yield replace(plan, pipeline=Pipeline.GPIPE)
    rounds = max(1, count // plan.pp)
    for many in (1, *choices.many_stages):
        if plan.pp * many <= room and count % rounds == 0:
            if many > 1:
                yield replace(plan, pipeline=Pipeline.INTERLEAVED, stages_per_rank=many)
            yield replace(plan, pipeline=Pipeline.ZERO_BUBBLE, stages_per_rank=many)
    if plan.pp * 2 <= room:
        yield replace(plan, pipeline=Pipeline.ZBV, stages_per_rank=2)
        is_wanted = source.num_experts or choices.pipeline is Pipeline.DUAL_PIPE_V
        if count >= 2 * plan.pp and is_wanted:
            yield replace(plan, pipeline=Pipeline.DUAL_PIPE_V, stages_per_rank=2)


def _experts(source: ModelSource, plan: ParallelPlan) -> list[int]:
    if not source.num_experts:
        return [1]
    return [
        ep for ep in _divisors(source.num_experts) if plan.num_expert_ranks % ep == 0 and ep <= 64
    ]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _sizes(plan: ParallelPlan) -> str:
    names = ("dp", "fsdp", "cp", "tp", "pp", "ep")
    return ", ".join(f"{name}={getattr(plan, name)}" for name in names if getattr(plan, name) > 1)


def _short(error: PlanError) -> str:
    """What kind of refusal it is, without its numbers."""
    text = str(error)
    if "batch_size" in text:
        return "the batch cannot be parted among the copies"
    if "sequence_length" in text:
        return "the sequence cannot be parted over cp and tp"
    return text.split(". ")[0]


def describe(candidate: Candidate) -> str:
    """A plan in a few words."""
    plan = candidate.plan
    words = [_sizes(plan) or "one rank", f"micro-batch {candidate.micro_batch_size}"]
    if plan.pp > 1:
        words.append(f"{plan.pipeline.value} x{plan.stages_per_rank}")
    words.append(f"recompute {plan.recompute.value}")
    if plan.reshard:
        words.append("reshard")
    if plan.replicas != 1:
        words.append(f"replicas {plan.replicas}")
    if plan.tp > 1 and not plan.sp:
        words.append("without sp")
    if candidate.offload:
        words.append(f"offload {candidate.offload:.0%}")
    return ", ".join(words)

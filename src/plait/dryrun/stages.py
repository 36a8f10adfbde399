"""Which layers stand on which pipeline stage, and what a plan asks of a job's numbers."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from plait.dryrun.model_source import ModelSource
from plait.dryrun.piece import BEFORE, BEHIND
from plait.dryrun.pretrain_job import PretrainJob
from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan

Stage = tuple[tuple[str, int], ...]
"""Names of pieces and how many of each: (("before", 1), ("layer", 7))."""

_MOST_NAMED = 16  # numbers to choose from, in an error


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a job's batch is spread. copies: of the model, with sequences of their own."""

    copies: int
    sequences: float
    num_micro_batches: int


def spread_of(job: PretrainJob, plan: ParallelPlan, world: int) -> Spread:
    """Spread a job over a world. Raises PlanError that names the number that does not divide."""
    if plan.num_ranks != world:
        sizes = "dp * fsdp * cp * tp * pp"
        raise PlanError(
            f"{sizes} = {plan.num_ranks}, but the world has {world} ranks. "
            f"{_ways_to_fill(plan, world)}"
        )
    copies = plan.dp * plan.fsdp
    group = copies * job.micro_batch_size
    if job.batch_size % group:
        legal = [n for n in range(1, job.batch_size + 1) if job.batch_size % n == 0]
        near = [n for n in legal if n % job.micro_batch_size == 0 and n <= 2 * group]
        raise PlanError(
            f"batch_size={job.batch_size} cannot be parted among dp * fsdp = {copies} copies in "
            f"micro-batches of {job.micro_batch_size}. Choose dp * fsdp * micro_batch_size from "
            f"{', '.join(map(str, near[-8:]))}, or another batch_size."
        )
    if job.sequence_length % (plan.cp * (plan.tp if plan.sp else 1)):
        raise PlanError(
            f"sequence_length={job.sequence_length} cannot be parted over cp={plan.cp}"
            f"{f' and tp={plan.tp} (sp)' if plan.sp else ''}. {_ways_to_part(job, plan)}"
        )
    return Spread(
        copies=copies,
        sequences=job.micro_batch_size / plan.cp,
        num_micro_batches=job.batch_size // group,
    )


def _ways_to_fill(plan: ParallelPlan, world: int) -> str:
    """What to choose so that a plan has so many ranks: fsdp, or of cp, tp and pp what is wrong."""
    rest = plan.cp * plan.tp * plan.pp
    if world % rest == 0:
        return f"Set plan.fsdp * plan.dp to {world // rest}."
    ways: list[str] = []
    for name, size in (("cp", plan.cp), ("tp", plan.tp), ("pp", plan.pp)):
        others = rest // size
        if size > 1 and world % others == 0:
            legal = [n for n in range(1, world // others + 1) if world // others % n == 0]
            ways.append(f"plan.{name} (now {size}) from {_named_few(legal)}")
    if not ways:
        legal = [n for n in range(1, world + 1) if world % n == 0]
        ways.append(f"plan.cp * plan.tp * plan.pp from {_named_few(legal)}")
    return (
        f"cp * tp * pp = {plan.cp} * {plan.tp} * {plan.pp} = {rest} does not divide {world}: "
        f"choose {', or '.join(ways)}."
    )


def _named_few(legal: list[int]) -> str:
    """The numbers, or the first and the last where there are many."""
    if len(legal) <= _MOST_NAMED:
        return ", ".join(map(str, legal))
    return f"{', '.join(map(str, legal[: _MOST_NAMED - 1]))}, ..., {legal[-1]}"


def _ways_to_part(job: PretrainJob, plan: ParallelPlan) -> str:
    """What to choose in place of a cp and an sp that do not divide the tokens, near what was."""
    tokens, shared = job.sequence_length, plan.tp if plan.sp else 1
    ways: list[str] = []
    of_cp = [n for n in range(1, 2 * plan.cp + 1) if tokens % (n * shared) == 0]
    if of_cp:
        ways.append(f"cp from {', '.join(map(str, of_cp))}")
    of_tp = [n for n in range(2, 2 * shared + 1) if tokens % (plan.cp * n) == 0]
    if plan.sp and of_tp:
        ways.append(f"tp from {', '.join(map(str, of_tp))}")
    if plan.sp and tokens % plan.cp == 0:
        ways.append("sp=False")
    ways.append(f"a sequence_length that {plan.cp * shared} divides")
    return f"Choose {', or '.join(ways)}."


def check_model(source: ModelSource, plan: ParallelPlan) -> None:
    """Raise PlanError where the model's numbers contradict the plan."""
    if plan.ep > 1 and not source.num_experts:
        raise PlanError(f"ep={plan.ep} shares experts, and {source.name} has none. Set ep=1.")
    if source.num_experts and source.num_experts % plan.ep:
        legal = [n for n in range(1, source.num_experts + 1) if source.num_experts % n == 0]
        raise PlanError(
            f"ep={plan.ep} does not divide num_experts={source.num_experts}. "
            f"Choose ep from {', '.join(map(str, legal))}."
        )
    num_stages = plan.pp * plan.stages_per_rank
    if num_stages > source.num_layers + 2:
        raise PlanError(
            f"pp={plan.pp} with stages_per_rank={plan.stages_per_rank} are {num_stages} stages, "
            f"and {source.name} has {source.num_layers} layers. Choose at most "
            f"{source.num_layers + 2} stages: the first may hold the embedding alone, the last the "
            "head."
        )


def stages_of(source: ModelSource, num_stages: int) -> tuple[Stage, ...]:
    """Layers in stages of equal numbers, the embedding in the first and the head in the last.

    Where layers do not divide, embedding and head count as a layer each, so that the first and the
    last stage have a layer less, as in Llama 3 [arXiv 2407.21783, section 3.3.2]; what is left over
    goes to the stages in the middle.
    """
    return _parted(source.kinds, num_stages)


@lru_cache(maxsize=256)
def _parted(kinds: tuple[str, ...], num_stages: int) -> tuple[Stage, ...]:
    slots = [BEFORE, *kinds, BEHIND]
    size, rest = divmod(len(slots), num_stages)
    first = (num_stages - rest) // 2
    sizes = [size + (first <= i < first + rest) for i in range(num_stages)]
    if len(kinds) % num_stages == 0:
        sizes = [len(kinds) // num_stages] * num_stages
        sizes[0] += 1
        sizes[-1] += 1
    found: list[Stage] = []
    at = 0
    for each in sizes:
        found.append(_stage(slots[at : at + each]))
        at += each
    return tuple(found)


def _stage(names: list[str]) -> Stage:
    return tuple(Counter(names).items())

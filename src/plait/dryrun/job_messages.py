"""What of a large job's messages nccl-tests measured, and what to say where that is nothing."""

from collections.abc import Sequence

from plait.cost.nccl_tests import unmatched
from plait.dryrun.data_parallel import Gathered, placements
from plait.dryrun.job_price import TimeParts
from plait.dryrun.piece_time import PassTimes, PieceClock, Setting
from plait.plan.parallel_plan import ParallelPlan


def sources_of_messages(
    passes: PassTimes, gathers: Sequence[Gathered], parts: TimeParts
) -> tuple[tuple[str, float], ...]:
    """Where the time of messages comes from: of fsdp's and dp's exposed time, as of all of it.

    passes: of all micro-batches of a rank. gathers: of its pieces.
    """
    moved_s = sum(each.total_s for each in gathers)
    share = sum(each.measured_s for each in gathers) / moved_s if moved_s else 0.0
    measured_s = passes.measured_s + share * parts.data_parallel_s
    model_s = parts.communication_s + parts.data_parallel_s - measured_s
    return (
        ("nccl-tests (messages)", measured_s),
        ("alpha-beta (messages)", max(0.0, model_s)),
    )


def note_of_unmatched(
    passes: PassTimes,
    gathers: Sequence[Gathered],
    plan: ParallelPlan,
    setting: Setting,
    clock: PieceClock,
) -> tuple[str, ...]:
    """A note, if nothing that nccl-tests measured is of a message of the job.

    passes: of all stages together. gathers: of all their pieces.
    """
    if not clock.measured or passes.measured_s or any(each.measured_s for each in gathers):
        return ()
    every = (
        clock.placement("tp", plan.tp, 1),
        clock.placement("ep", plan.ep, setting.ep_stride),
        *placements(plan, clock),
    )
    placed = dict.fromkeys((x.num_ranks, x.ranks_in_node) for x in every if x.num_ranks > 1)
    return (unmatched(clock.measured, placed, "job"),)

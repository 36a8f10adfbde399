"""What of a large job's price is a closed form and not played, in words."""

from plait.dryrun.pretrain_job import PretrainJob
from plait.plan.parallel_plan import Pipeline


def closed_forms(job: PretrainJob, expert_load: float, is_shared_head: bool) -> tuple[str, ...]:
    """A note for each closed form. expert_load: rows of the busiest rank's experts over the mean.

    is_shared_head: the vocabulary is parted over tp.
    """
    plan = job.plan
    notes: list[str] = []
    if plan.fsdp * plan.dp > 1:
        how = "beside neighbouring layers" if job.overlap else "alone"
        notes.append(f"closed form: gathers and sums of fsdp and dp, {how}")
    if plan.cp > 1:
        notes.append("closed form: the ring of cp, beside attention; parts are taken as equal")
    if plan.ep > 1:
        how = (
            "expert_load, as set"
            if job.expert_percentile is None
            else f"percentile {job.expert_percentile:g}, all experts chosen alike"
        )
        notes.append(
            "closed form: exchanges of ep; the busiest rank has "
            f"{expert_load:.3g} of the mean rows ({how}), memory that of the mean"
        )
        if plan.pipeline is Pipeline.DUAL_PIPE_V:
            notes.append("exchanges of ep run beside the other half of DualPipeV's pairs")
    if is_shared_head:
        notes.append("closed form: sums over a vocabulary parted over tp")
    return tuple(notes)

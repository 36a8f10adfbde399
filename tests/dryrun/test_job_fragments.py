"""What the allocator reserves on ranks of large jobs."""

from dataclasses import replace

import pytest
import torch

import plait
from plait.cost.accelerators import find_cluster
from plait.dryrun.allocator import Reserved
from plait.dryrun.job_fragments import Fragments, shortened
from plait.dryrun.job_memory import Ledger
from plait.dryrun.job_report import job_report
from plait.dryrun.pipeline_tables import Action, table_of
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import Pricer, price_job, source_of
from plait.dryrun.price_step import price_step
from plait.models.decoder import Decoder
from plait.nn.experts import ExpertSettings
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute
from tests.dryrun.small_job import CONFIG

JOB = PretrainJob(name="small", model=CONFIG, sequence_length=1024, batch_size=32)


def in_bfloat16(recompute: Recompute, micro_batches: int) -> PretrainJob:
    """A job of one rank with two moments in bfloat16, as torch.optim.AdamW keeps them."""
    return replace(
        JOB,
        plan=ParallelPlan(recompute=recompute),
        batch_size=micro_batches,
        gradient_bytes=2,
        optimizer_bytes=4,
    )


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.SELECTIVE])
def test_a_rank_alone_reserves_what_the_replay_of_its_whole_step_reserves(recompute):
    """Two ways to the same figure: pieces put together, and every operator of one whole step.

    Both peaks are where the second backward begins. With recompute "full" it would be at its end,
    where `plait.run` still holds all new gradients, and a large job has added each to its buffer.
    """
    cluster = find_cluster("h100", 1)
    (mine,) = price_job(in_bfloat16(recompute, 2), cluster).classes
    with torch.device("meta"):
        model = Decoder(CONFIG).to(torch.bfloat16)
        tokens_BT = torch.empty((2, 1024), dtype=torch.int64)
    whole = price_step(
        model,
        [tokens_BT],
        plait.ParallelPlan(num_micro_batches=2, recompute=recompute),
        cluster,
        loss=lambda model, x: model.loss(model(x), x) / x.numel(),
        optimizer=torch.optim.AdamW(model.named_parameters(), fused=True),
    ).memory
    assert mine.fragments is not None
    assert whole.reserved is not None
    assert whole.expandable is not None
    # A job counts cuBLAS' workspace beside what it replays, a schedule within.
    workspace_bytes = cluster.device.blas_workspace_bytes
    fixed, grown = mine.fragments.fixed, mine.fragments.expandable
    assert fixed.used_bytes + workspace_bytes == pytest.approx(whole.reserved.used_bytes, rel=0.05)
    assert fixed.peak_bytes + workspace_bytes == pytest.approx(whole.reserved.peak_bytes, rel=0.05)
    assert grown.peak_bytes + workspace_bytes == pytest.approx(
        whole.expandable.peak_bytes, rel=0.05
    )


PLANS = {
    "sharded": ParallelPlan(fsdp=8),
    "sharded and gathered for each pass": ParallelPlan(fsdp=8, reshard=True),
    "tensor parallel": ParallelPlan(tp=4, sp=True, fsdp=2, recompute=Recompute.SELECTIVE),
    "pipeline": ParallelPlan(pp=4, fsdp=2),
    "zero bubble": ParallelPlan(pp=4, fsdp=2, pipeline=Pipeline.ZERO_BUBBLE, stages_per_rank=2),
    "context": ParallelPlan(cp=2, fsdp=4, recompute=Recompute.FULL),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_what_is_used_stays_within_the_ledger_and_what_is_reserved_covers_it(plan):
    """The ledger adds the most of each kind, though not all are there at once."""
    price = price_job(replace(JOB, plan=plan), find_cluster("h100", 8))
    for each in price.classes:
        assert each.fragments is not None
        inside = each.ledger.total_bytes - each.ledger.outside_bytes
        for found in (each.fragments.fixed, each.fragments.expandable):
            assert 0.5 * inside < found.used_bytes <= 1.01 * inside
            assert found.used_bytes <= found.peak_bytes
            assert found.fits
    assert "reserved with fragments" in job_report(price)


def test_offloaded_activations_leave_the_allocator():
    cluster = find_cluster("h100", 1)
    plan = ParallelPlan(recompute=Recompute.NONE)
    (kept,) = price_job(replace(JOB, plan=plan), cluster).classes
    (away,) = price_job(replace(JOB, plan=plan, offload=1.0), cluster).classes
    assert kept.fragments is not None
    assert away.fragments is not None
    saved = kept.ledger.bytes_by_kind["saved activations"]
    less = kept.fragments.fixed.used_bytes - away.fragments.fixed.used_bytes
    assert less > 0.5 * saved


def test_a_rank_of_ep_asks_for_its_share_of_the_experts_matrices():
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=1024)
    model = replace(CONFIG, family="mixtral", experts=experts)
    job = replace(JOB, model=model, plan=ParallelPlan(fsdp=8, reshard=True))
    one, eight = (
        price_job(replace(job, plan=replace(job.plan, ep=ep)), find_cluster("h100", 8)).classes[0]
        for ep in (1, 8)
    )
    assert one.fragments is not None
    assert eight.fragments is not None
    assert eight.fragments.fixed.used_bytes < one.fragments.fixed.used_bytes


@pytest.mark.parametrize(
    ("pipeline", "per_rank"), [(Pipeline.ONE_F_ONE_B, 1), (Pipeline.ZERO_BUBBLE, 2)]
)
def test_a_shortened_pipeline_ends_what_it_begins_and_fills_as_far(pipeline, per_rank):
    def most_at_once(tasks):
        live = most = 0
        for task in tasks:
            live += (task.action is Action.FORWARD) - (
                task.action in (Action.BACKWARD, Action.BACKWARD_WEIGHT)
            )
            most = max(most, live)
        return most, live

    for tasks in table_of(pipeline, 4, per_rank, 32).tasks:
        short = shortened(tasks)
        assert len(short) < len(tasks)
        assert most_at_once(short) == (most_at_once(tasks)[0], 0)


def test_a_job_that_only_fragments_keep_from_fitting_says_so():
    price = price_job(replace(JOB, plan=ParallelPlan(fsdp=8)), find_cluster("h100", 8))
    needed = 90 * 2**30
    full = Reserved(80 * 2**30, 70 * 2**30, fits=False, needed_bytes=needed)
    room = Reserved(71 * 2**30, 70 * 2**30)
    (only,) = price.classes
    tight = replace(price, classes=(replace(only, fragments=Fragments(full, room)),))
    assert not tight.fits
    assert "the allocator's fragments make it" in tight.binding
    assert "expandable_segments:True) fit" in tight.binding


def test_the_first_step_lacks_the_state_that_is_made_at_its_end():
    state = {"parameters": 2, "gradients": 4, "optimizer state": 12}
    long_passes = Ledger({**state, "saved activations": 30, "context": 5}, outside_bytes=5)
    assert long_passes.first_step_bytes == long_passes.total_bytes - 12 == 41
    short_passes = Ledger({**state, "saved activations": 3, "context": 5}, outside_bytes=5)
    assert short_passes.first_step_bytes == 2 + 4 + 12 + 5


def test_a_plan_that_does_not_fit_is_played_until_that_is_known():
    cluster = find_cluster("h100", 2)
    job = replace(JOB, plan=ParallelPlan(pp=2))
    whole = price_job(job, cluster)
    assert len(whole.classes) == 2
    fullest = whole.fullest
    assert fullest.reserved_bytes is not None
    # Room for the ledger of all, and not for what the fullest reserves.
    device = replace(cluster.device, memory_bytes=fullest.reserved_bytes - 2**20)
    pricer = Pricer(job, replace(cluster, device=device), source_of(job))
    played = pricer.planned(job).with_fragments(while_they_fit=True)
    assert [each.fragments is not None for each in played].count(True) == 1
    assert all(each.fragments is not None for each in pricer.planned(job).with_fragments())

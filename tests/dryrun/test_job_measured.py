"""Large jobs with what was measured: messages by nccl-tests, operators by a table."""

from dataclasses import replace

import pytest
import torch

from plait.cost.accelerators import find_cluster
from plait.cost.collectives import Collective
from plait.cost.nccl_tests import Measured
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.table import Table
from plait.cost.table_entry import Entry
from plait.dryrun.job_report import job_report
from plait.dryrun.price_job import price_job
from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan
from tests.dryrun.small_job import JOB


@pytest.fixture(scope="module")
def cluster():
    return find_cluster("h100", 8)


def test_measured_messages_change_the_price(cluster):
    job = replace(JOB, plan=ParallelPlan(tp=8, sp=True))
    slow = [
        Measured(
            collective=kind,
            num_ranks=8,
            ranks_per_node=8,
            num_bytes=(1,),
            durations_s=(1.0,),
        )
        for kind in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    ]
    assert price_job(job, cluster, measured=slow).step_s > 10 * price_job(job, cluster).step_s


def runs_of(collectives, num_ranks):
    return [
        Measured(
            collective=each,
            num_ranks=num_ranks,
            ranks_per_node=num_ranks,
            num_bytes=(1, 10**9),
            durations_s=(1e-3, 1e-3),
        )
        for each in collectives
    ]


def test_times_of_messages_say_whether_nccl_tests_measured_them(cluster):
    job = replace(JOB, plan=ParallelPlan(tp=4, fsdp=2))
    modelled = dict(price_job(job, cluster).sources)
    assert modelled["nccl-tests (messages)"] == 0 < modelled["alpha-beta (messages)"]
    of_tp = price_job(job, cluster, measured=runs_of(Collective, 4))
    parts, sources = of_tp.parts, dict(of_tp.sources)
    assert sources["nccl-tests (messages)"] == pytest.approx(parts.communication_s)
    assert sources["alpha-beta (messages)"] == pytest.approx(parts.data_parallel_s)
    of_all = price_job(job, cluster, measured=runs_of(Collective, 4) + runs_of(Collective, 2))
    assert dict(of_all.sources)["alpha-beta (messages)"] == pytest.approx(0, abs=1e-9)
    assert not any("nccl-tests" in note for note in (*of_tp.notes, *of_all.notes))


def test_runs_of_nccl_tests_that_match_no_message_of_a_job_are_noted(cluster):
    job = replace(JOB, plan=ParallelPlan(tp=4, fsdp=2))
    other = runs_of([Collective.ALL_REDUCE], 16)
    found = price_job(job, cluster, measured=other)
    assert found.step_s == price_job(job, cluster).step_s
    assert dict(found.sources)["nccl-tests (messages)"] == 0
    note = found.notes[-1]
    assert "nccl-tests measured (all_reduce of 16 ranks, 16 in a node): the job's are of" in note
    assert "4 ranks, 4 in a node, 2 ranks, 2 in a node. Measure those." in note
    assert note in job_report(found)
    alone = replace(JOB, plan=ParallelPlan())
    lone = price_job(alone, find_cluster("h100", 1), measured=other)
    assert "the job's are of no ranks" in lone.notes[-1]


def measured_product(device, sizes, slow_down):
    rows, inner, columns = sizes
    cost = Cost(
        kind=Kind.MATRIX,
        bytes=2 * (rows * inner + inner * columns + rows * columns),
        flops=2 * rows * inner * columns,
        dtype=torch.bfloat16,
        sizes=sizes,
    )
    seconds = slow_down * operation_s(cost, device)
    return Entry(
        key=f"mm {sizes}",
        operator="aten.mm.default",
        seconds=seconds,
        low_s=seconds,
        high_s=seconds,
        flops=cost.flops,
        bytes=cost.bytes,
        dtype="torch.bfloat16",
        sizes=sizes,
    )


def test_a_table_of_the_device_prices_the_products_of_a_large_job(cluster):
    """Products that were measured twice as slow as the roofline says take twice as long."""
    sizes = [(1024, 512, n) for n in (512, 1024, 4096)] + [(1024, n, 512) for n in (1024, 4096)]
    entries = tuple(measured_product(cluster.device, each, 2.0) for each in sizes)
    table = Table("there", entries, cluster.device)
    base, slow = price_job(JOB, cluster), price_job(JOB, cluster, table=table)
    assert slow.parts.matrix_s == pytest.approx(2 * base.parts.matrix_s, rel=0.05)
    assert dict(slow.sources)["interpolated"] == pytest.approx(slow.parts.matrix_s, rel=0.05)
    assert dict(base.sources)["interpolated"] == 0
    assert "interpolated" in job_report(slow)
    other = replace(table, device=replace(cluster.device, name="a100"))
    with pytest.raises(PlanError, match="measured on a100"):
        price_job(JOB, cluster, table=other)

from dataclasses import replace

import pytest

from plait.cost.accelerators import find_cluster
from plait.cost.clusters import Cluster, Link
from plait.cost.collectives import Collective
from plait.cost.nccl_tests import Measured
from plait.cost.topology import Algorithm, message, place, send_s
from plait.errors import PlanError

INSIDE = Link(latency_s=1e-6, bandwidth_bytes_per_s=100e9)
BETWEEN = Link(latency_s=10e-6, bandwidth_bytes_per_s=10e9, step_latency_s=1e-6)


@pytest.fixture
def cluster() -> Cluster:
    return replace(find_cluster("h100", 64), inside=INSIDE, between=BETWEEN)


def test_an_axis_inside_a_node_is_a_ring_over_its_link(cluster):
    where = place(cluster, "tp", size=8)
    got = message(Collective.ALL_GATHER, 8e9, where)
    assert where.num_nodes == 1
    assert got.duration_s == pytest.approx(1e-6 + 7e9 / 100e9)


def test_neighbours_across_nodes_use_all_adapters_and_distant_ranks_one_each(cluster):
    near = message(Collective.ALL_GATHER, 16e9, place(cluster, "fsdp", size=16))
    far = message(Collective.ALL_GATHER, 16e9, place(cluster, "fsdp", size=8, stride=8))
    assert near.duration_s == pytest.approx(10e-6 + 15e-6 + 15e9 / 80e9)
    assert far.duration_s == pytest.approx(10e-6 + 14e9 / 10e9, rel=1e-3)


@pytest.mark.parametrize(("size", "stride", "together"), [(8, 1, 8), (4, 4, 2), (16, 8, 1)])
def test_ranks_in_a_node_follow_from_size_and_stride(cluster, size, stride, together):
    assert place(cluster, "x", size=size, stride=stride).ranks_in_node == together


def test_a_small_sum_over_many_nodes_is_a_tree_and_a_large_one_is_not(cluster):
    where = place(cluster, "dp", size=64, stride=8)
    assert message(Collective.ALL_REDUCE, 1e4, where).algorithm is Algorithm.TREE
    assert message(Collective.ALL_REDUCE, 1e10, where).algorithm is not Algorithm.TREE


def test_the_fastest_algorithm_is_never_slower_than_the_ring(cluster):
    where = place(cluster, "dp", size=32)
    ring_s = 10e-6 + 62e-6 + 2 * 31 / 32 * 1e9 / 80e9
    assert message(Collective.ALL_REDUCE, 1e9, where).duration_s <= ring_s * (1 + 1e-12)


def test_an_exchange_sends_to_other_nodes_over_one_adapter(cluster):
    where = place(cluster, "ep", size=16)
    got = message(Collective.ALL_TO_ALL, 16e9, where)
    assert got.duration_s == pytest.approx(10e-6 + 8e9 / 10e9)


def test_what_was_measured_goes_before_the_model(cluster):
    run = Measured(
        collective=Collective.ALL_REDUCE,
        num_ranks=8,
        ranks_per_node=8,
        num_bytes=(10**6, 10**8),
        durations_s=(1e-4, 1e-2),
    )
    where = place(cluster, "tp", size=8)
    got = message(Collective.ALL_REDUCE, 1e7, where, [run])
    assert got.algorithm is Algorithm.MEASURED
    assert got.duration_s == pytest.approx(1e-3)
    assert message(Collective.ALL_GATHER, 1e7, where, [run]).algorithm is not Algorithm.MEASURED


def test_one_rank_and_no_bytes_take_no_time(cluster):
    assert message(Collective.ALL_REDUCE, 1e9, place(cluster, "tp", size=1)).duration_s == 0
    assert message(Collective.ALL_REDUCE, 0, place(cluster, "tp", size=8)).duration_s == 0


def test_a_stage_sends_inside_its_node_or_between_nodes(cluster):
    assert send_s(1e9, cluster, stride=4) == pytest.approx(1e-6 + 0.01)
    assert send_s(1e9, cluster, stride=8) == pytest.approx(10e-6 + 0.1)


def test_an_axis_without_ranks_is_refused(cluster):
    with pytest.raises(PlanError, match="an axis needs ranks"):
        place(cluster, "tp", size=0)

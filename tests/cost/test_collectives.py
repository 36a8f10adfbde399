import pytest
import torch

from plait.cost.clusters import Link, cpu, h100, h200
from plait.cost.collectives import Collective, collective_of, collective_s, sent_bytes
from plait.errors import PlanError

NVLINK = Link(latency_s=5e-6, bandwidth_bytes_per_s=350e9)


@pytest.mark.parametrize("collective", Collective)
@pytest.mark.parametrize("num_ranks", [2, 5, 8])
def test_times_are_those_of_a_ring_played_step_by_step(collective, num_ranks):
    link = Link(latency_s=3e-6, bandwidth_bytes_per_s=1e9, step_latency_s=2e-6)
    num_bytes = 840_000.0
    rounds = 2 if collective is Collective.ALL_REDUCE else 1
    seconds = link.latency_s
    for _ in range(rounds):
        for _ in range(num_ranks - 1):
            seconds += link.step_latency_s + num_bytes / num_ranks / link.bandwidth_bytes_per_s
    assert collective_s(collective, num_bytes, num_ranks, link) == pytest.approx(seconds)


def test_an_all_reduce_moves_what_its_two_halves_move():
    halves = [
        sent_bytes(each, 1e6, 8) for each in (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)
    ]
    assert sent_bytes(Collective.ALL_REDUCE, 1e6, 8) == pytest.approx(sum(halves))


def test_one_rank_sends_nothing_and_waits_for_nobody():
    assert all(collective_s(each, 1e9, 1, NVLINK) == 0 for each in Collective)
    with pytest.raises(PlanError, match="needs ranks, got 0"):
        collective_s(Collective.ALL_REDUCE, 1e9, 0, NVLINK)


def test_operators_are_known_by_their_names():
    assert collective_of("_c10d_functional.all_reduce.default") is Collective.ALL_REDUCE
    gather = "_c10d_functional.all_gather_into_tensor_coalesced.default"
    assert collective_of(gather) is Collective.ALL_GATHER
    assert collective_of("_c10d_functional.wait_tensor.default") is None
    assert collective_of("aten.all_reduce.default") is None


def test_an_axis_inside_a_node_uses_the_fast_link():
    cluster = h200(16)
    assert cluster.link("tp", size=8) is cluster.inside
    assert cluster.link("fsdp", size=2, stride=8) is cluster.between
    assert cluster.link("tp", size=16) is cluster.between


def test_few_rows_use_the_device_badly():
    device = h100(8).device

    def share(*sizes):
        return device.matrix_efficiency_at(*sizes, dtype=torch.bfloat16)

    shares = [share(rows, 8192, 8192) for rows in (64, 256, 2048, 8192)]
    assert shares == sorted(shares)
    # Arithmetic, then each operand and the result moved once, in bfloat16.
    m, k, n = 2048, 8192, 1280
    whole_s = 2 * m * k * n / (0.65 * 989e12) + 2 * (m * k + k * n + m * n) / 3.35e12
    assert 2 * m * k * n / (989e12 * share(m, k, n)) == pytest.approx(whole_s)


def test_impossible_machines_are_refused():
    with pytest.raises(PlanError, match="bandwidth must be positive"):
        Link(latency_s=0, bandwidth_bytes_per_s=0)
    with pytest.raises(PlanError, match="latency cannot be negative"):
        Link(latency_s=-1e-6, bandwidth_bytes_per_s=1e9)
    with pytest.raises(PlanError, match="needs ranks, got 0"):
        cpu(0)

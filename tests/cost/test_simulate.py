import itertools
import random

import pytest

from plait.cost.simulate import (
    COMPUTE,
    FILLER,
    Host,
    Operation,
    communication,
    list_schedule,
    longest_paths_s,
    simulate,
)
from plait.cost.timeline import Stream
from plait.errors import GraphError

TP, DP = communication("tp"), communication("dp")


def ms(operation):
    return [round(1e3 * s, 6) for s in operation]


def two_replicas():
    """compute -> collective -> compute, for two replicas; 2 ms each."""
    operations = []
    for _ in range(2):
        first = len(operations)
        operations += [
            Operation("a", COMPUTE, 2e-3),
            Operation("c", TP, 2e-3, (first,)),
            Operation("b", COMPUTE, 2e-3, (first + 1,)),
        ]
    return operations


def test_without_other_work_a_collective_is_exposed():
    done = simulate(two_replicas()[:3], [0, 1, 2])
    assert ms(done.start_s) == [0, 2, 4]
    assert done.total_s == pytest.approx(6e-3)
    assert done.exposed_s == pytest.approx(2e-3)


def test_one_replica_computes_while_the_other_communicates():
    # a0 a1 b0 b1 back to back; c1 runs behind b0.
    done = list_schedule(two_replicas(), [(0.0,)] * 6)
    assert done.order == (0, 1, 3, 4, 2, 5)
    assert ms(done.start_s) == [0, 2, 4, 2, 4, 6]
    assert done.exposed_s == 0
    assert (done.compute_s, done.communication_s) == pytest.approx((8e-3, 4e-3))


def test_a_bad_order_exposes_what_a_good_one_hides():
    done = simulate(two_replicas(), [0, 1, 2, 3, 4, 5])
    assert ms(done.start_s) == [0, 2, 4, 6, 8, 10]
    assert done.exposed_s == pytest.approx(4e-3)


def test_collectives_of_one_group_queue_and_of_two_groups_do_not():
    same = [Operation("x", TP, 1e-3), Operation("y", TP, 1e-3)]
    other = [Operation("x", TP, 1e-3), Operation("y", DP, 1e-3)]
    assert simulate(same, [1, 0]).start_s == pytest.approx((1e-3, 0))
    assert simulate(other, [1, 0]).start_s == (0, 0)


def test_filler_runs_only_when_nothing_else_can():
    operations = [
        Operation("gradient of the weight", COMPUTE, 3e-3),
        Operation("a", COMPUTE, 1e-3),
        Operation("c", TP, 2e-3, (1,)),
        Operation("b", COMPUTE, 1e-3, (2,)),
    ]
    done = list_schedule(operations, [FILLER, (0.0,), (1.0,), (2.0,)])
    assert [operations[i].name[0] for i in done.order] == ["a", "c", "g", "b"]
    assert done.exposed_s == 0


def test_pinned_bytes_over_the_limit_bring_the_filler_forward():
    operations = [Operation(f"step {i}", COMPUTE, 1e-3, (i - 1,) if i else ()) for i in range(6)]
    operations += [Operation(f"w{i}", COMPUTE, 1e-3, (i,), pinned_bytes=10) for i in range(6)]
    priority = [(float(i),) for i in range(6)] + [FILLER] * 6
    lazy = list_schedule(operations, priority)
    assert [i for i in lazy.order if i < 6] == list(lazy.order[:6])
    bounded = list_schedule(operations, priority, pinned_limit_bytes=20)
    pinned = waiting = 0
    for i in bounded.order:
        pinned += 10 if i < 6 else -10
        waiting = max(waiting, pinned)
    assert waiting == 30  # one more than fits is ready, and goes at once
    assert bounded.total_s == lazy.total_s


def test_slowdown_applies_to_compute_beside_communication_only():
    operations = [Operation("c", TP, 3e-3), Operation("a", COMPUTE, 4e-3)]
    # 3 ms at 1 / 1.5 of the speed do 2 ms of the work; the other 2 ms run alone.
    done = simulate(operations, [0, 1], slowdown=1.5)
    assert ms(done.end_s) == [3, 5]
    alone = simulate(operations[1:], [0], slowdown=1.5)
    assert alone.total_s == pytest.approx(4e-3)


def test_a_host_that_computes_launches_a_collective_only_when_its_turn_comes():
    operations = [
        Operation("a", COMPUTE, 1e-3),
        Operation("long", COMPUTE, 5e-3),
        Operation("c", TP, 1e-3, (0,)),
        Operation("b", COMPUTE, 1e-3, (2,)),
    ]
    late = [0, 1, 2, 3]
    assert simulate(operations, late).start_s[2] == pytest.approx(1e-3)
    assert simulate(operations, late, host=Host.BLOCKING).start_s[2] == pytest.approx(6e-3)
    early = [0, 2, 1, 3]
    assert simulate(operations, early, host=Host.BLOCKING).start_s[2] == pytest.approx(1e-3)


def test_a_blocking_host_waits_before_it_launches_what_comes_later():
    operations = [
        Operation("c", TP, 4e-3),
        Operation("d", DP, 1e-3, (0,)),  # the host waits for c here,
        Operation("e", COMPUTE, 1e-3),  # and so comes to e late
    ]
    assert simulate(operations, [0, 1, 2]).start_s[2] == 0
    assert simulate(operations, [0, 1, 2], host=Host.BLOCKING).start_s[2] == pytest.approx(4e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_found_plays_as_it_was_scheduled(seed):
    operations, priority = random_program(seed)
    found = list_schedule(operations, priority)
    played = simulate(operations, found.order)
    assert played.start_s == found.start_s
    assert played.end_s == found.end_s
    # Collectives that need no collective are launched early enough for a host that computes.
    blocking = simulate(operations, found.order, host=Host.BLOCKING)
    assert blocking.total_s == found.total_s


@pytest.mark.parametrize("seed", range(20))
def test_schedules_keep_to_dependencies_and_streams(seed):
    operations, priority = random_program(seed)
    for slowdown in (1.0, 1.19):
        done = list_schedule(operations, priority, slowdown=slowdown)
        for i, each in enumerate(operations):
            assert all(done.end_s[k] <= done.start_s[i] for k in each.depends_on)
            longest = each.duration_s * (slowdown if each.stream == COMPUTE else 1)
            lasted = done.end_s[i] - done.start_s[i]
            assert each.duration_s - 2e-9 <= lasted <= longest + 2e-9
        for stream in (COMPUTE, TP, DP):
            spans = sorted(
                (done.start_s[i], done.end_s[i])
                for i, each in enumerate(operations)
                if each.stream == stream
            )
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert done.exposed_s == pytest.approx(done.total_s - busy_s(done, COMPUTE), abs=1e-8)


def busy_s(done, stream):
    return sum(
        end - start
        for each, start, end in zip(done.operations, done.start_s, done.end_s, strict=True)
        if each.stream == stream
    )


def random_program(seed):
    """Computing operations in layers, with collectives between them that need computed values."""
    random_numbers = random.Random(seed)
    operations, priority = [], []
    for i in range(60):
        computing = [k for k, each in enumerate(operations) if each.stream == COMPUTE]
        stream = random_numbers.choice([COMPUTE, COMPUTE, TP, DP])
        known = computing if stream != COMPUTE else range(i)
        before = random_numbers.sample(list(known), min(len(known), random_numbers.randrange(4)))
        duration_s = random_numbers.randrange(0, 40) * 1e-5
        operations.append(Operation(str(i), stream, duration_s, tuple(before)))
        priority.append((random_numbers.randrange(5),))
    return operations, priority


def test_the_longest_path_counts_every_stream():
    assert ms(longest_paths_s(two_replicas())) == [6, 4, 2, 6, 4, 2]


def test_the_timeline_has_both_streams_in_the_order_of_launching():
    timeline = list_schedule(two_replicas(), [(0.0,)] * 6).timeline("forward")
    assert [event.name for event in timeline.events] == ["a", "c", "a", "c", "b", "b"]
    assert timeline.duration_s == pytest.approx(8e-3)
    assert timeline.busy_s(Stream.COMMUNICATION) == pytest.approx(4e-3)
    assert {event.program for event in timeline.events} == {"forward"}


def test_what_cannot_run_is_named():
    circle = [Operation("x", COMPUTE, 1e-3, (1,)), Operation("y", TP, 1e-3, (0,))]
    with pytest.raises(GraphError, match="x never runs: it waits for y"):
        list_schedule(circle, [(0.0,), (0.0,)])
    with pytest.raises(GraphError, match="never runs"):
        simulate(two_replicas(), [2, 0, 1, 3, 4, 5])
    with pytest.raises(GraphError, match="each of 6 operations once"):
        simulate(two_replicas(), [0, 0, 1, 2, 3, 4])
    with pytest.raises(GraphError, match="depends on 7, of 1"):
        simulate([Operation("x", COMPUTE, 1e-3, (7,))], [0])
    with pytest.raises(GraphError, match="6 operations, but 1 priorities"):
        list_schedule(two_replicas(), [(0.0,)])

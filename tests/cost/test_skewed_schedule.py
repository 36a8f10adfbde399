"""The order of replicas: against every single skew, and against all orders of a small piece."""

import itertools
import random
from dataclasses import replace

import pytest

from plait.cost.simulate import (
    COMPUTE,
    Host,
    Operation,
    communication,
    list_schedule,
    simulate,
)
from plait.cost.skewed_schedule import SKEWS, Lane, skewed_schedule

TP = communication("tp")


def chain(replica, durations_s, first):
    """Compute and messages in turn, each after the one before."""
    operations, lanes = [], []
    for i, seconds in enumerate(durations_s):
        after = (first + i - 1,) if i else ()
        operations.append(Operation(f"{replica}.{i}", (COMPUTE, TP)[i % 2], seconds, after))
        lanes.append(Lane(replica=replica, place=float(i)))
    return operations, lanes


def two_replicas(durations_s):
    first, second = (chain(r, durations_s, r * len(durations_s)) for r in (0, 1))
    return first[0] + second[0], first[1] + second[1]


def layer(seed):
    """Short and long computations between equal messages, as around attention and in an MLP."""
    generator = random.Random(seed)
    compute = [generator.choice((0.2, 0.3, 1.6, 3.2)) * 1e-3 for _ in range(5)]
    durations = [x for pair in itertools.zip_longest(compute, [0.3e-3] * 4) for x in pair]
    return two_replicas(durations[:-1])


def of_one_skew(operations, lanes, skew, first):
    stage, priorities = [0] * len(operations), []
    for i, each in enumerate(operations):
        for k in each.depends_on:
            stage[i] = stage[k] + (operations[k].stream != COMPUTE)
    for lane, s in zip(lanes, stage, strict=True):
        behind = abs(lane.replica - first)
        priorities.append((s + skew * behind, float(behind), lane.place))
    return list_schedule(operations, priorities).total_s


@pytest.mark.parametrize("seed", range(20))
def test_no_single_skew_is_better_than_what_is_found(seed):
    operations, lanes = layer(seed)
    found = skewed_schedule(operations, lanes)
    singles = [of_one_skew(operations, lanes, s, f) for s in SKEWS for f in (0, 1)]
    assert found.total_s <= min(singles) + 1e-12
    played = simulate(operations, found.order)
    assert played.total_s == pytest.approx(found.total_s)


def test_a_skew_that_changes_from_stage_to_stage_is_found():
    """Llama 70B's layer on four H100: where little is computed, one replica should lead later."""
    short, message, product = 42e-6, 149e-6, 821e-6
    steps = [(COMPUTE, 259e-6), (TP, message), (COMPUTE, short), (TP, message)]
    steps += [(COMPUTE, product)] * 3
    steps += [(TP, message), (COMPUTE, short), (TP, message), (COMPUTE, 249e-6), (COMPUTE, 97e-6)]
    operations = [
        Operation(f"{replica}.{i}", stream, s, (replica * len(steps) + i - 1,) if i else ())
        for replica in (0, 1)
        for i, (stream, s) in enumerate(steps)
    ]
    lanes = [Lane(replica=r, place=float(i)) for r in (0, 1) for i in range(len(steps))]
    found = skewed_schedule(operations, lanes)
    single_s = min(of_one_skew(operations, lanes, s, first) for s in SKEWS for first in (0, 1))
    assert found.exposed_s < 0.8 * (single_s - found.compute_s)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_found_is_near_the_best_of_all_orders_of_a_small_piece(seed):
    generator = random.Random(seed)
    durations = [generator.choice((1, 2, 3, 5)) * 1e-3 for _ in range(5)]
    operations, lanes = two_replicas(durations)
    best_s = min(
        simulate(operations, order).total_s
        for order in itertools.permutations(range(len(operations)))
        if all(
            order.index(k) < order.index(i) for i, o in enumerate(operations) for k in o.depends_on
        )
        and order.index(0) < order.index(5)  # the replicas are alike: one of them leads
    )
    assert skewed_schedule(operations, lanes).total_s <= 1.06 * best_s


def test_equal_problems_give_equal_orders():
    operations, lanes = layer(3)
    for host in Host:
        first, second = (skewed_schedule(operations, lanes, host=host) for _ in range(2))
        assert first.order == second.order


def with_filler(durations_s):
    """Two replicas, and last what nothing waits for, which stands first in its place."""
    operations, lanes = two_replicas(durations_s)
    operations.append(Operation("weights", COMPUTE, 1e-3))
    lanes.append(Lane(replica=None, place=-1.0, is_filler=True))
    return operations, lanes


def test_a_filler_waits_for_what_replicas_do_not_hide():
    operations, lanes = with_filler([2e-3, 3e-3, 2e-3])
    found = skewed_schedule(operations, lanes)
    alone = skewed_schedule(operations[:-1], lanes[:-1])
    assert found.exposed_s == pytest.approx(alone.exposed_s - 1e-3)
    assert found.order.index(len(operations) - 1) > 2


def test_a_filler_stays_in_its_place_where_replicas_hide_all():
    found = skewed_schedule(*with_filler([2e-3, 1e-3, 2e-3]))
    assert found.exposed_s == 0
    assert found.order[0] == len(found.order) - 1


def test_a_replica_follows_as_closely_as_hides_all():
    """The last of four equal parts of a stage hides a message that is a little shorter."""
    step_s = 1e-3
    operations, lanes = [], []
    for replica in (0, 1):
        first = len(operations)
        streams = [*[COMPUTE] * 4, TP, *[COMPUTE] * 4]
        for i, stream in enumerate(streams):
            seconds = 0.7 * step_s if stream == TP else step_s
            after = (first + i - 1,) if i else ()
            operations.append(Operation(f"{replica}.{i}", stream, seconds, after))
            lanes.append(Lane(replica=replica, place=float(i)))
    found = skewed_schedule(operations, lanes)
    names = [operations[i].name for i in found.order if operations[i].stream == COMPUTE]
    assert found.exposed_s == 0
    assert names[:8] == ["0.0", "0.1", "1.0", "0.2", "1.1", "0.3", "1.2", "1.3"]


def test_only_fillers_that_a_message_needs_wait_for_it_the_nearest_first():
    """a and b are gradients of inputs, with a weight gradient each, which may wait for the message.

    A filler that waits reads its operands again, so one that need not wait goes first. It need, if
    the other lasts just as long as the message: either may turn out a little different.
    """
    operations = [
        Operation("a", COMPUTE, 1e-3),
        Operation("weight of a", COMPUTE, 1e-3, (0,), pinned_bytes=1000),
        Operation("b", COMPUTE, 1e-3, (0,)),
        Operation("weight of b", COMPUTE, 1e-3, (2,), pinned_bytes=1000),
        Operation("sum", TP, 0.5e-3, (2,)),
        Operation("c", COMPUTE, 1e-3, (4,)),
    ]
    lanes = [
        Lane(replica=None, place=float(i), is_filler="weight" in each.name)
        for i, each in enumerate(operations)
    ]
    for host in Host:
        found = skewed_schedule(operations, lanes, host=host, bytes_per_s=1e9)
        names = [operations[i].name for i in found.order if operations[i].stream == COMPUTE]
        assert names == ["a", "weight of a", "b", "weight of b", "c"]
        assert found.exposed_s == 0
    longer = [replace(each, duration_s=1e-3) if each.name == "sum" else each for each in operations]
    found = skewed_schedule(longer, lanes, bytes_per_s=1e9)
    assert found.order.index(1) > found.order.index(4)  # both wait
    assert found.exposed_s == 0


def test_without_messages_there_is_one_order():
    operations = [Operation("a", COMPUTE, 1e-3), Operation("b", COMPUTE, 1e-3, (0,))]
    lanes = [Lane(replica=0, place=0.0), Lane(replica=1, place=1.0)]
    assert skewed_schedule(operations, lanes).order == (0, 1)

from dataclasses import replace
from itertools import pairwise

import pytest

from plait.dryrun.pipeline import StageTimes, in_flight, pipeline_s, play, with_offload
from plait.dryrun.pipeline_tables import Action, Table, Task, table_of, table_of_one
from plait.errors import GraphError, PlanError
from plait.plan.parallel_plan import Pipeline

EQUAL = StageTimes(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, saved_bytes=1.0)
KINDS = [
    (Pipeline.GPIPE, 1),
    (Pipeline.ONE_F_ONE_B, 1),
    (Pipeline.INTERLEAVED, 2),
    (Pipeline.ZERO_BUBBLE, 2),
    (Pipeline.ZBV, 2),
    (Pipeline.DUAL_PIPE_V, 2),
]


def run(pipeline, ranks, per_rank, count, stage=EQUAL, **options):
    table = table_of(pipeline, ranks, per_rank, count)
    return play(table, [stage] * table.num_stages, **options)


@pytest.mark.parametrize("pipeline", [Pipeline.GPIPE, Pipeline.ONE_F_ONE_B])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 16), (8, 32)])
def test_the_bubble_of_gpipe_and_1f1b_is_p_minus_1_of_m_plus_p_minus_1(pipeline, p, m):
    """Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1."""
    assert run(pipeline, p, 1, m).bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 8), (4, 2, 16), (4, 4, 8), (8, 2, 32)])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(p, v, m):
    """Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2."""
    stage = StageTimes(forward_s=1 / v, backward_input_s=1 / v, backward_weight_s=1 / v)
    total_s = run(Pipeline.INTERLEAVED, p, v, m, stage).total_s
    assert total_s == pytest.approx(3 * m + 3 * (p - 1) / v)


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_zbv_has_hardly_a_bubble_where_all_parts_take_equal_time(p, m):
    """Qi et al. 2024, arXiv 2405.15362, section 3: none but the start of the last rank."""
    busy_s = 6.0 * m
    assert run(Pipeline.ZBV, p, 2, m).total_s <= busy_s + p
    assert run(Pipeline.ONE_F_ONE_B, p, 1, m, doubled(EQUAL)).total_s >= busy_s + 6 * (p - 1)


def doubled(stage):
    return StageTimes(
        forward_s=2 * stage.forward_s,
        backward_input_s=2 * stage.backward_input_s,
        backward_weight_s=2 * stage.backward_weight_s,
    )


@pytest.mark.parametrize(("pipeline", "v"), KINDS)
def test_every_schedule_does_all_the_work_and_no_rank_works_twice_at_once(pipeline, v):
    p, m = 4, 16
    played = run(pipeline, p, v, m, send_s=0.25)
    assert all(busy == pytest.approx(3.0 * m * v) for busy in played.busy_s)
    for rank in range(p):
        tasks = played.tasks(rank)
        for before, after in pairwise(tasks):
            assert after.start_s >= before.end_s - 1e-9
    done = {
        (each.task.action, each.task.stage, each.task.micro_batch): each
        for rank in range(p)
        for each in played.tasks(rank)
    }
    for (action, stage, number), each in done.items():
        if action is Action.FORWARD and stage > 0:
            assert each.start_s >= done[action, stage - 1, number].end_s - 1e-9


def test_1f1b_holds_as_many_micro_batches_as_stages_are_behind_and_gpipe_all():
    p, m = 4, 16
    flying = in_flight(table_of(Pipeline.ONE_F_ONE_B, p, 1, m), [10.0] * p)
    assert flying.micro_batches == (4, 3, 2, 1)
    assert flying.saved_bytes == (40.0, 30.0, 20.0, 10.0)
    assert in_flight(table_of(Pipeline.GPIPE, p, 1, m), [1.0] * p).micro_batches == (m,) * p


def test_a_split_backward_holds_its_activations_until_the_weight_part():
    tasks = (
        Task(Action.FORWARD, 0, 0, 0),
        Task(Action.BACKWARD_INPUT, 0, 0, 1),
        Task(Action.FORWARD, 0, 1, 2),
        Task(Action.BACKWARD_WEIGHT, 0, 0, 3),
        Task(Action.BACKWARD, 0, 1, 4),
    )
    assert in_flight(Table((tasks,), (0,)), [1.0]).micro_batches == (2,)


@pytest.mark.parametrize(("pipeline", "v"), KINDS)
@pytest.mark.parametrize("m", [64, 100])
def test_a_long_pipeline_is_priced_from_a_short_one(pipeline, v, m):
    p = 4
    stage = replace(EQUAL, forward_s=0.9)
    try:
        whole_s = run(pipeline, p, v, m, stage, send_s=0.1).total_s
    except PlanError:
        pytest.skip("PyTorch has no such schedule")
    short_s = pipeline_s(pipeline, m, [stage] * (p * v), p, send_s=0.1)
    assert short_s == pytest.approx(whole_s, rel=0.02)


def test_sending_takes_time_on_the_way_through_all_stages():
    assert run(Pipeline.GPIPE, 4, 1, 1, send_s=0.5).total_s == pytest.approx(4 * 3 + 6 * 0.5)


def test_one_rank_does_its_micro_batches_one_after_another():
    assert play(table_of_one(5), [EQUAL]).total_s == pytest.approx(15.0)
    assert in_flight(table_of_one(5), [2.0]).saved_bytes == (2.0,)


def test_offloaded_activations_cost_time_only_where_copies_take_longer_than_computing():
    assert with_offload(EQUAL, 0.5, 1.0) == replace(EQUAL, saved_bytes=0.5)
    slow = with_offload(EQUAL, 1.0, 0.25)
    assert (slow.forward_s, slow.backward_s, slow.saved_bytes) == (4.0, 4.0, 0.0)


def test_micro_batches_that_a_schedule_cannot_take_are_refused_with_its_reason():
    with pytest.raises(PlanError, match="num_micro_batches=2"):
        table_of(Pipeline.ONE_F_ONE_B, 4, 1, 2)


def test_tasks_that_wait_for_each_other_are_an_error():
    ranks = ((Task(Action.BACKWARD, 0, 0, 0), Task(Action.FORWARD, 0, 0, 1)),)
    with pytest.raises(GraphError, match="wait for each other"):
        play(Table(ranks, (0,)), [EQUAL])


def test_a_pipeline_needs_the_times_of_all_its_stages():
    with pytest.raises(GraphError, match="1 stages have times"):
        play(table_of(Pipeline.GPIPE, 2, 1, 2), [EQUAL])


def test_dualpipev_hides_exchanges_behind_the_other_half_of_a_pair():
    """DeepSeek-V3, arXiv 2412.19437, section 3.2.1: a forward and a backward cover each other."""
    p, m = 4, 16
    sent = replace(EQUAL, exchange_s=0.5)
    base = run(Pipeline.DUAL_PIPE_V, p, 2, m)
    hidden = run(Pipeline.DUAL_PIPE_V, p, 2, m, sent)
    pairs = [sum(a.slot == b.slot for a, b in pairwise(tasks)) for tasks in hidden.table.tasks]
    assert hidden.hidden_s == pytest.approx(pairs)  # two exchanges of half a second in each
    assert min(pairs) > 0
    assert hidden.total_s < base.total_s - min(pairs) / 2
    slowed = run(Pipeline.DUAL_PIPE_V, p, 2, m, sent, interference=1.25)
    assert slowed.hidden_s == pytest.approx([0.8 * each for each in pairs])
    assert run(Pipeline.ZBV, p, 2, m, sent).hidden_s == (0.0,) * p


def test_what_a_rank_holds_is_counted_by_its_own_stages():
    table = table_of(Pipeline.INTERLEAVED, 2, 2, 4)
    whole = in_flight(table, [1.0, 1.0, 1.0, 1.0])
    assert whole.saved_bytes == tuple(map(float, whole.micro_batches))
    only_first = in_flight(table, [1.0, 0.0, 0.0, 0.0])
    assert only_first.saved_bytes[0] > 0
    assert only_first.saved_bytes[1] == 0

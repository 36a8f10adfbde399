"""Plans are data: they check themselves and survive JSON."""

import pytest

from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan


def test_a_plan_survives_json():
    plan = ParallelPlan(dp=2, tp=4, sp=True, replicas="auto", recompute="full", num_micro_batches=8)
    assert ParallelPlan.from_json(plan.to_json()) == plan
    assert plan.num_ranks == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 0}, "tp must be a whole number from 1, got 0"),
        ({"dp": True}, "dp must be a whole number"),
        ({"sp": True}, "needs tp above 1"),
        ({"replicas": "some"}, "replicas must be"),
        ({"replicas": [2, 0]}, "separated by commas, got '2,0'"),
        ({"replicas": []}, "replicas must be"),
        ({"replicas": [2, 3], "tp": 2, "sp": True}, "with sp=True"),
        ({"recompute": "fully"}, "Did you mean 'full'"),
    ],
)
def test_an_impossible_plan_is_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        ParallelPlan(**settings)


def test_replicas_of_each_piece_survive_json():
    plan = ParallelPlan(replicas=[2, 3, 1])
    assert ParallelPlan.from_json(plan.to_json()) == plan == ParallelPlan(replicas="2,3,1")
    assert plan.replicas_by_piece == (2, 3, 1)
    assert ParallelPlan(replicas=2).replicas_by_piece is None


@pytest.mark.parametrize("text", ["[]", "{", '{"tpp": 2}'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError):
        ParallelPlan.from_json(text)

"""What the benchmark of step times compares, and what it learns from."""

import pytest
import torch

from benchmarks.dryrun_recipes import RECIPES
from benchmarks.dryrun_time import kendall_tau
from benchmarks.dryrun_time_runs import SEEN_BY_RANKS, on_one_core, on_two_ranks


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_every_recipe_that_a_schedule_of_o0_runs_is_compared_once(has_bfloat16):
    found = [*on_one_core(has_bfloat16=has_bfloat16), *on_two_ranks()]
    assert len({recipe.name for recipe in found}) == len(found) >= 24
    expected = [x for x in RECIPES.values() if x.way == "schedule" and x.level == "O0"]
    if not has_bfloat16:
        assert {each.dtype for each in found} == {torch.float32}
        expected = [each for each in expected if each.dtype is torch.float32]
    assert all(each in found for each in expected)


def test_no_rank_learns_from_what_it_is_compared_on():
    compared = on_two_ranks()
    assert compared
    assert not [each for each in SEEN_BY_RANKS if each in compared]


def test_ranking_counts_pairs_in_the_same_order():
    assert kendall_tau([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1.0
    assert kendall_tau([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]) == pytest.approx(1 / 3)

"""What the benchmark of step times compares, and what it learns from."""

import pytest
import torch

from benchmarks.dryrun_ranking import by_chance, kendall_tau, rank_plans
from benchmarks.dryrun_recipes import RECIPES, Recipe
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


def test_plans_are_ranked_among_those_of_one_model_that_steps_tell_apart():
    fast = Recipe(name="fast")
    slow = Recipe(name="slow", recompute="full")
    equal = Recipe(name="as fast", micro_batches=2)
    other = Recipe(name="of another batch", batch=2)
    steps_s = [[1.0, 1.1] * 8, [2.0, 2.1] * 8, [1.1, 1.0] * 8, [9.0] * 16]
    found = rank_plans([fast, slow, equal, other], steps_s, [1.0, 3.0, 2.0, 0.5])
    assert (found.num_pairs, found.told_apart, found.num_right) == (3, 2, 2)
    assert found.tau == 1.0
    assert rank_plans([fast, slow], steps_s[:2], [3.0, 1.0]).tau == -1.0


def test_majorities_are_as_probable_as_a_fair_coin_makes_them():
    assert by_chance(8, 16) == 1.0
    assert by_chance(16, 16) == by_chance(0, 16) == 2 / 2**16
    assert by_chance(13, 16) == pytest.approx(0.0213, abs=1e-4)  # table of the sign test

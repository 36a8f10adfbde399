"""How well predicted step times rank runs, and plans of one model on one batch among them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

from benchmarks.dryrun_recipes import Recipe

LEVEL = 0.05  # of the sign test that tells two plans apart


@dataclass(frozen=True)
class PlanRanking:
    """Pairs of plans of one model. told_apart: those that steps in turn put in one order."""

    num_pairs: int
    told_apart: int
    num_right: int

    @property
    def tau(self) -> float:
        """Kendall's tau of the pairs that are told apart."""
        return 2 * self.num_right / self.told_apart - 1


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs [Kendall 1938]."""
    signs = [
        1 if (a - b) * (c - d) > 0 else -1
        for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
    ]
    return sum(signs) / len(signs)


def rank_plans(
    recipes: Sequence[Recipe], steps_s: Sequence[Sequence[float]], predicted_s: Sequence[float]
) -> PlanRanking:
    """Compare each two plans of one model, batch and dtype.

    steps_s: of each recipe, measured in turns with the others. A pair whose measured order chance
    alone makes (two-sided sign test) says nothing about a ranking and is only counted.
    """
    num_pairs = told_apart = num_right = 0
    for i, j in combinations(range(len(recipes)), 2):
        if _job_of(recipes[i]) != _job_of(recipes[j]):
            continue
        num_pairs += 1
        later = [a > b for a, b in zip(steps_s[i], steps_s[j], strict=True)]
        if by_chance(sum(later), len(later)) > LEVEL:
            continue
        told_apart += 1
        is_later = sum(later) > len(later) / 2
        num_right += (predicted_s[i] > predicted_s[j]) == is_later
    return PlanRanking(num_pairs, told_apart, num_right)


def by_chance(num_later: int, num_turns: int) -> float:
    """How probable such a majority or a larger one is, either way, of two equal runs."""
    least = max(num_later, num_turns - num_later)
    tail = sum(comb(num_turns, k) for k in range(least, num_turns + 1)) / 2**num_turns
    return min(1.0, 2 * tail)


def _job_of(recipe: Recipe) -> Hashable:
    """What is left of a recipe without its plan, and on how many ranks it runs."""
    bare = replace(recipe, name="", recompute="none", micro_batches=1, parallel="")
    return recipe.ranks, repr(bare)

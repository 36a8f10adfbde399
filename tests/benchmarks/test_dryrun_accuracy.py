"""The dry run's memory beside the allocator's, in this process, of what no eager program makes."""

import pytest

from benchmarks.dryrun_recipes import RECIPES
from benchmarks.dryrun_worker import measure, predict


@pytest.mark.parametrize("name", ["llama O1", "gpt2 O1"])
def test_a_step_with_islands_takes_the_memory_that_its_price_says(name):
    truth, predicted = measure(RECIPES[name]), predict(RECIPES[name])
    for step in ("first", "later"):
        assert predicted[step] == pytest.approx(truth[step], rel=1e-3)

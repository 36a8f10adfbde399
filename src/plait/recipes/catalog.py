"""The recipes by name."""

from collections.abc import Callable, Mapping

from plait.errors import ConfigError, nearest_name
from plait.recipes.stdlib import stdlib_15m, stdlib_demo
from plait.recipes.tuning import dpo, sft
from plait.train.job import Job
from plait.train.tuning_job import TuningJob

RECIPES: Mapping[str, Callable[[], Job | TuningJob]] = {
    "stdlib_15m": stdlib_15m,
    "stdlib_demo": stdlib_demo,
    "sft": sft,
    "dpo": dpo,
}


def find_recipe(name: str) -> Job | TuningJob:
    """Make the job of a recipe. Raises ConfigError with the nearest known name."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}. {nearest_name(name, RECIPES)}")
    return RECIPES[name]()

"""The recipes by name."""

from collections.abc import Callable, Mapping

from plait.errors import ConfigError, nearest_name
from plait.recipes.stdlib import stdlib_15m, stdlib_demo
from plait.train.job import Job

RECIPES: Mapping[str, Callable[[], Job]] = {
    "stdlib_15m": stdlib_15m,
    "stdlib_demo": stdlib_demo,
}


def find_recipe(name: str) -> Job:
    """Make the job of a recipe. Raises ConfigError with the nearest known name."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}. {nearest_name(name, RECIPES)}")
    return RECIPES[name]()

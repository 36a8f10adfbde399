"""Modules of the extra `magnetotellurics`, imported when they are first used."""

import importlib
from typing import Any

from plait.errors import MissingExtraError


class OptionalModule:
    """Stands for a module; its first attribute imports it.

    So that `plait --help` neither needs SciPy and matplotlib nor waits for them, and a verb that
    does need them says which extra is missing.
    """

    def __init__(self, name: str, *, needed_for: str) -> None:
        self._name = name
        self._needed_for = needed_for

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
        except ImportError as error:
            package = self._name.partition(".")[0]
            raise MissingExtraError(
                f"{self._needed_for} needs {package}: pip install 'plait[magnetotellurics]'"
            ) from error
        return getattr(module, attribute)

"""Every exception that Plait raises on purpose.

PlaitError(ValueError)
|-- ConfigError        a recipe, a --set, a resolved.json
|-- ModelError         an architecture, its config.json, its inputs
|-- DataError          files to train on or to evaluate
|-- CheckpointError    what is saved and loaded
|-- TrainingError      a run that cannot go on
|-- PlanError          a parallel plan, or a model and inputs that contradict it
|-- GraphError         a program that cannot be captured, compiled or run as asked
|-- SurveyError        magnetotelluric survey, mesh and model files, with file and line
|-- EarthError         a mesh, a resistivity model or a receiver that cannot be modelled
|-- InversionError     an inversion that cannot start or cannot go on
`-- MissingExtraError  an optional dependency that is not installed

CompilerWarning (a UserWarning): the level asked for cannot be had here; another runs.
"""

import difflib
from collections.abc import Iterable


class PlaitError(ValueError):
    """A mistake of the user: what was given, what is allowed, what to do."""


class ConfigError(PlaitError):
    """A setting that does not exist or has the wrong type or value."""


class ModelError(PlaitError):
    """A model that cannot be built, or inputs that it cannot take."""


class DataError(PlaitError):
    """Data that are missing, empty or not text."""


class CheckpointError(PlaitError):
    """A checkpoint that cannot be written, or is not whole."""


class TrainingError(PlaitError):
    """A training run that cannot go on."""


class PlanError(PlaitError):
    """A parallel plan that is impossible, or that the model or its inputs contradict."""


class GraphError(PlaitError):
    """A program that cannot be captured, compiled or run as asked."""


class CompilerWarning(UserWarning):
    """The machine lacks what a level needs; the program runs at a lower one, with its results."""


class SurveyError(PlaitError):
    """A magnetotelluric file that cannot be read, or survey data that contradict themselves."""


class EarthError(PlaitError):
    """A mesh, a resistivity model or a receiver that cannot be modelled."""


class InversionError(PlaitError):
    """An inversion that cannot start or cannot go on."""


class MissingExtraError(PlaitError):
    """An optional dependency that is not installed."""


def nearest_name(given: str, known: Iterable[str]) -> str:
    """Make the end of a message about an unknown name: the nearest match and the known ones."""
    names = sorted(known, key=str.casefold)
    matches = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean {matches[0]!r}? " if matches else ""
    return f"{hint}Known: {', '.join(names)}."

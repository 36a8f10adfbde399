"""Say which extra is missing before a magnetotelluric verb imports what needs it."""

from importlib.util import find_spec

from plait.errors import MissingExtraError


def require_extra() -> None:
    """Raise MissingExtraError unless SciPy and matplotlib are installed."""
    absent = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
    if absent:
        raise MissingExtraError(
            f"this verb needs {' and '.join(absent)}: pip install 'plait[magnetotellurics]'"
        )

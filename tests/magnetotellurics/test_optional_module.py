import subprocess
import sys

import pytest

from plait.errors import MissingExtraError
from plait.magnetotellurics.optional_module import OptionalModule


def test_a_module_is_imported_when_it_is_used():
    assert OptionalModule("math", needed_for="this").sqrt(4.0) == 2.0


def test_an_absent_package_is_named_with_its_extra():
    absent = OptionalModule("no_such_package.part", needed_for="a picture")
    with pytest.raises(MissingExtraError, match=r"a picture needs no_such_package: pip install"):
        absent.Figure()


def test_the_commands_start_without_scipy_and_matplotlib():
    code = (
        "import sys, plait.cli.invert, plait.cli.forward;"
        "print([name for name in ('scipy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

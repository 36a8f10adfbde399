"""Where the survey files lie; tests that need them skip with a reason where they are absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def mt_data() -> Path:
    folder = Path(os.environ.get("PLAIT_MT_DATA", ROOT / "../shared/data/mt"))
    if not folder.is_dir():
        pytest.skip(f"no survey data at {folder}; set PLAIT_MT_DATA to their folder")
    return folder

"""What all tests share: no test reads or fills the user's compile cache."""

import pytest


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", "")

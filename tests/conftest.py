"""What all tests share: no user's compile cache, and every pass is followed by its check."""

import pytest

from plait.compiler.levels import Pass
from plait.graph.verify import verify, verify_pass


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", "")


@pytest.fixture(autouse=True)
def verified_passes(monkeypatch):
    """A graph that breaks a rule fails the test in which a pass made it."""

    unverified = Pass.__call__

    def run(self, graph, plan, cluster):
        after = unverified(self, graph, plan, cluster)
        if self.moves:
            verify(after)
        else:
            verify_pass(graph, after)
        return after

    monkeypatch.setattr(Pass, "__call__", run)

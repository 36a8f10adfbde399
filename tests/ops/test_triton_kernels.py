"""Kernels in Triton, in its interpreter on a CPU, against their formulas in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Float32: sums of some dozen terms in another order. Bfloat16: the interpreter cuts results off,
# where a GPU rounds them: up to one unit in the last place.
TOLERANCES = {"torch.float32": 2e-6, "torch.bfloat16": 2**-7}


def test_kernels_are_their_formulas_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[triton]")
    script = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == 8
    for dtype, function, errors in cases:
        assert max(errors) <= TOLERANCES[dtype], (dtype, function, errors)

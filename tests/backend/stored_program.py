"""A program in a process of its own, with a compile cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_program(folder: Path, *arguments: str) -> dict:
    """Run `program.py` of the folder; what its last line says, as JSON."""
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        env=os.environ | {"PLAIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

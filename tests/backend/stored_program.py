"""A program in a process of its own, with a compile cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.forked_process import run_python


def run_program(folder: Path, *arguments: str, anew: bool = False) -> dict:
    """Run `program.py` of the folder; what its last line says, as JSON.

    anew: with a Python of its own, whose hashes and addresses are others.
    """
    environment = os.environ | {"PLAIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if anew:
        command = [sys.executable, "program.py", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    else:
        done = run_python("program.py", *arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

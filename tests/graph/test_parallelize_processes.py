"""A spread model in real processes, which exchange real data over gloo."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multiprocess
_TIME_LIMIT_S = 500  # of which 30 are used on an idle machine


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, "our_qwen3"),
        pytest.param(
            2, "gpt2,our_llama,llama,phi3,olmo2,gemma2,mixtral", marks=pytest.mark.exhaustive
        ),
        pytest.param(4, "our_qwen3,gpt2,phi3", marks=pytest.mark.exhaustive),
    ],
)
def test_processes_agree_with_one_process_eager_and_compiled(world, names, tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.graph.spread_process"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store"), names],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=_TIME_LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]

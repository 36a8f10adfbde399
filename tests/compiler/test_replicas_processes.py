"""Replicas in real processes, which exchange real data over gloo."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multiprocess
_TIME_LIMIT_S = 500  # of which 40 are used on an idle machine


def run(world, task, folder):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.compiler.replica_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store"), task],
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


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, "our_qwen3"),
        pytest.param(2, "llama,gpt2_dropout,phi3,olmo2,mistral", marks=pytest.mark.exhaustive),
        pytest.param(4, "our_qwen3,gpt2_dropout", marks=pytest.mark.exhaustive),
    ],
)
def test_processes_have_one_schedule_and_the_bits_of_the_unsplit_step(world, names, tmp_path):
    run(world, names, tmp_path)


@pytest.mark.parametrize("what", ["plan", "weights"])
def test_ranks_that_disagree_all_stop_and_say_how(what, tmp_path):
    run(2, what, tmp_path)

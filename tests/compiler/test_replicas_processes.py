"""Replicas in real processes, which exchange real data over gloo."""

import pytest

from tests.rank_processes import run_ranks

pytestmark = pytest.mark.multiprocess


def run(world, task, folder):
    run_ranks(world, "tests.compiler.replica_worker", world, folder / "store", task)


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


@pytest.mark.parametrize(("world", "what"), [(2, "plan"), (2, "weights"), (4, "one axis of two")])
def test_ranks_that_disagree_all_stop_and_say_how(world, what, tmp_path):
    run(world, what, tmp_path)


def test_a_spread_model_is_compiled_in_replicas_by_one_line(tmp_path):
    run(2, "compiled", tmp_path)


def test_a_model_that_pytorch_spread_is_compiled_in_replicas(tmp_path):
    run(2, "spread by PyTorch", tmp_path)

"""A spread model in real processes, which exchange real data over gloo."""

import pytest

from tests.rank_processes import run_ranks

pytestmark = pytest.mark.multiprocess


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
    run_ranks(world, "tests.graph.spread_process", world, tmp_path / "store", names)

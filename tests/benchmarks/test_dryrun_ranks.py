"""Ranks of large jobs as `dryrun_accuracy --device cuda` runs them, without a GPU.

Each recipe is cut down to a model that a CPU runs at once; its plan stays. The truth is what the
CPU's allocator reports.
"""

import pytest
import torch

import plait
from benchmarks.dryrun_gpu import LEAST, errors_of, measure, summary, worker
from benchmarks.dryrun_rank_worker import predict
from benchmarks.dryrun_ranks import MODELS, RANKS, cut_down, make_schedule
from plait.cost.accelerators import find_cluster
from plait.dryrun.memory_trace import Kind

# TorchDynamo makes one for the collectives of DTensor.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
SCALARS = 2e-4  # numbers of a few bytes, which kernels wrap and a replay does not
NAMES = [recipe.name for recipe in RANKS]
# Cut down, ranks of larger models and longer sequences are the same.
UNLIKE = {(x.plan, x.dtype, x.optimizer, MODELS[x.model][0]): x for x in reversed(RANKS)}.values()


def test_there_are_as_many_ranks_as_promised_and_all_differ():
    assert len(set(NAMES)) == len(NAMES) >= LEAST


@pytest.mark.parametrize("recipe", RANKS, ids=NAMES)
def test_every_model_can_be_parted_as_planned(recipe):
    settings = MODELS[recipe.model][1]
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert settings[name] % recipe.plan.tp == 0
    assert recipe.rows % recipe.plan.num_micro_batches == 0
    assert recipe.tokens % recipe.plan.tp == 0


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(x, id=x.name, marks=[pytest.mark.slow] if i % 6 else [])
        for i, x in enumerate(UNLIKE)
    ],
)
def test_every_rank_is_compiled_and_priced(recipe):
    recipe = cut_down(recipe)
    schedule = make_schedule(recipe, "cpu", "h200")
    assert schedule.is_step
    assert "optimizer" in schedule.programs
    cluster = find_cluster("h200", recipe.plan.num_ranks)
    workspace_bytes = cluster.device.blas_workspace_bytes
    price = plait.price(schedule, cluster)
    for ledger in (price.first_memory, price.memory):
        assert ledger.reserved is not None
        assert workspace_bytes < ledger.peak_bytes <= ledger.reserved.used_bytes
        assert ledger.reserved.used_bytes <= ledger.reserved.peak_bytes
        assert ledger.by_kind[Kind.WORKSPACE] >= workspace_bytes
    assert price.memory.by_kind[Kind.OPTIMIZER] > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Llama-3 8B, 32 layers, fsdp 8, tp 8, 1 x 8192", id="fsdp and tp"),
        pytest.param(
            "Llama-3 8B, 32 layers, tp 8, replicas 2, recompute full, 4 x 8192",
            id="replicas and recompute",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_needs_what_is_predicted_in_another_process(name):
    number = f"small{NAMES.index(name)}"
    truth = worker("measure", "cpu", "cpu", number)
    assert isinstance(truth, dict), truth
    predicted = predict(cut_down(RANKS[NAMES.index(name)]), "cpu", "cpu")
    assert errors_of(predicted, truth)["requested"] <= 100 * SCALARS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured_and_one_line_says_so():
    with pytest.raises(SystemExit, match="PyTorch sees no GPU here") as ended:
        measure(quick=True)
    assert "\n" not in str(ended.value)


def test_what_was_left_out_misses_the_count():
    counted, *_ = summary({"allocated": [0.5] * (LEAST - 1)}, least=LEAST)
    assert counted.holds is False
    counted, worst, median = summary({"allocated": [0.5] * (LEAST - 1) + [4.0]}, least=LEAST)
    assert counted.holds
    assert (worst.value, worst.holds) == (4.0, False)
    assert (median.value, median.target) == (0.5, None)


def test_the_error_is_the_larger_of_the_first_step_and_later_ones():
    truth = {"reserved, first": 100.0, "reserved, later": 200.0, "reserved, spread": 0.0}
    found = errors_of({"reserved, first": 98.0, "reserved, later": 201.0}, truth)
    assert found == {"reserved": pytest.approx(2.0)}


def test_a_worker_that_fails_says_why():
    assert "IndexError" in str(worker("predict", "cpu", "cpu", 10_000))

"""The causal split: attention by parts of its queries, equal to the unsplit step to rounding."""

from dataclasses import replace

import pytest
import torch

import plait
from plait.errors import PlanError
from tests.compiler.replica_models import Case, both, differing, schedules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

# Two roundings: the sums of an attention are grouped by parts, and gradients of keys are rounded
# for each part before they are added.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-1}

CASES = [
    Case("our_llama", replicas=2, causal_split=True),
    Case("our_qwen3", tp=4, sp=True, replicas=3, causal_split=True, numerics="fast"),
    Case("llama", tp=2, sp=True, replicas=4, causal_split=True, numerics="fast"),
    Case("our_llama", replicas=4, num_tokens=512, causal_split=True, numerics="fast",
         dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_agree_and_every_attention_is_split(case):
    found, expected, schedule = both(case)
    worst = max((each.relative for each in differing(found, expected)), default=0.0)
    assert worst < TOLERANCE[case.dtype]
    for text in schedule.certificates.values():
        assert "attention takes each token with others" not in text
    assert any("causal attentions" in text for text in schedule.certificates.values())


def test_strict_numerics_keep_the_bits_of_the_forward():
    found, expected, _ = both(CASES[0])
    assert [x.item() for x in found["loss"]] == [x.item() for x in expected["loss"]]


def test_a_mask_that_hides_more_than_the_later_tokens_is_refused_by_name():
    with pytest.raises(PlanError, match=r"causal_split=True: no attention .*mask hides.*others"):
        schedules(Case("mistral", replicas=2, causal_split=True, numerics="fast"))


def test_a_plan_without_replicas_has_no_causal_split():
    with pytest.raises(PlanError, match="needs replicas above 1"):
        plait.ParallelPlan(tp=2, causal_split=True)
    plan = plait.ParallelPlan(tp=2, replicas="auto", causal_split=True)
    assert plait.ParallelPlan.from_json(plan.to_json()) == plan
    assert replace(plan, causal_split=False) != plan

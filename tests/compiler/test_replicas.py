"""A step in replicas has the bits of the same step unsplit: loss, and every gradient of each rank.

All ranks are computed in one process, with true collectives (`LocalTensorMode`). Strict numerics.
"""

import re
import sys
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from plait.errors import PlanError
from plait.ops import linear_cross_entropy
from tests.compiler.replica_models import NAMES, Case, both, differing, schedules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:Dynamo detected a call to a `functools.lru_cache:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

# Under sequence parallelism a rank holds other tokens when they are split, so what it adds up over
# its own tokens, for the weight of a norm or the bias after a scatter, has other terms; the sum
# over ranks then has the same terms, grouped otherwise.
REGROUPED = {torch.float32: 1e-6, torch.bfloat16: 3e-2}

BF16 = torch.bfloat16

# Each family once; between them every pair of the values below.
VALUES = {
    "tp": (2, 4),
    "sp": (False, True),
    "replicas": (2, 3, 4),
    "is_batch": (False, True),
    "dtype": (torch.float32, BF16),
    "threads": (1, 2),
    "width": (64, 1024),
}
QUICK = [
    Case("our_llama", tp=4, sp=True, replicas=3, batch=4, dtype=BF16),
    Case("our_qwen3", tp=4, replicas=4, width=1024, dtype=BF16, threads=2),
    Case("llama", tp=4, sp=True, replicas=3, threads=2),
    Case("qwen3", tp=2, sp=True, replicas=2, width=1024),
    Case("mistral", tp=2, sp=True, replicas=3, num_tokens=130),
    Case("gpt2", tp=2, replicas=2, batch=2, threads=2),
    Case("gpt2_dropout", tp=4, sp=True, replicas=3),
    Case("phi3", tp=2, sp=True, replicas=4, batch=4),
    Case("olmo2", tp=2, sp=True, replicas=4, dtype=BF16, threads=2),
    Case("gemma2", tp=2, replicas=3, batch=3, width=1024, dtype=BF16),
    Case("mixtral", tp=2, replicas=2),
    Case("our_gemma2", tp=2, sp=True, replicas=2, num_tokens=130, dtype=BF16),
    Case("our_mixtral", tp=4, replicas=2, batch=3),
]


def whole_matrix():
    """Every family with every tp, sp, number of replicas and axis; and in each wide form."""
    for name, tp, sp in product(NAMES, (2, 4), (False, True)):
        if name.endswith("mixtral") and sp:
            continue  # its router sends shares of tokens to experts: refused, see below
        for replicas, batch in product((2, 3, 4), (1, 4)):
            yield Case(name, tp=tp, sp=sp, replicas=replicas, batch=batch)
        for i, (dtype, threads) in enumerate(product((torch.float32, BF16), (1, 2))):
            replicas = 2 + (i + tp // 2) % 3
            yield Case(
                name, tp=tp, sp=sp, replicas=replicas, width=1024, dtype=dtype, threads=threads
            )


def check(case):
    found, expected, schedule = both(case)
    regrouped = 0
    for difference in differing(found, expected):
        x = expected[difference.name][difference.rank]
        assert case.sp, difference
        assert case.batch == 1, difference
        assert x.dim() == 1, difference
        assert difference.relative < REGROUPED[case.dtype], difference
        regrouped += 1
    sys.stdout.write(f"{case}: {len(expected)} tensors on {case.tp} ranks, {regrouped} regrouped\n")
    check_collectives(schedule, case)


def check_collectives(schedule, case):
    """All are split, but for sums of weights' gradients."""
    notes = [note for note in schedule.notes if note.by == "replicas" and "c10d" in note.operator]
    assert any(f"split in {case.replicas}" in note.text for note in notes)
    assert re.search(
        r"certificate of \w+_x\d: split along tokens: \d+ nodes; tried by execution: \d+ distinct",
        schedule.report(),
    )
    for note in notes:
        if note.is_refusal:
            assert "has no tokens, as the sum of a weight's gradient" in note.text, str(note)
            assert "all_reduce" in note.operator


def test_the_cases_hold_every_pair_of_values():
    cases = [vars(case) | {"is_batch": case.batch > 1} for case in QUICK]
    for a, b in combinations(VALUES, 2):
        found = {(case[a], case[b]) for case in cases}
        assert found >= set(product(VALUES[a], VALUES[b])), (a, b)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_loss_and_every_gradient_have_the_bits_of_the_unsplit_step(case):
    check(case)


def test_as_many_tokens_as_a_head_is_wide_are_told_from_its_features():
    check(Case("gpt2_dropout", width=128, num_tokens=16))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(whole_matrix()), ids=str)
def test_the_whole_matrix(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("our_llama", tp=4, replicas=(2, 3)),
        Case("gpt2_dropout", replicas=(3, 1), num_tokens=130),
        Case("olmo2", replicas=(1, 4), dtype=BF16),
    ],
    ids=str,
)
def test_each_piece_may_have_its_own_number_of_replicas(case):
    found, expected, schedule = both(case)
    assert differing(found, expected) == []
    texts = [note.text for note in schedule.notes if note.by == "replicas"]
    for number in (2, 3, 4):
        is_split = any(text.startswith(f"split in {number} along the token") for text in texts)
        assert is_split == (number in case.replicas), texts


def test_a_number_of_replicas_for_each_piece_must_be_given():
    with pytest.raises(PlanError, match="2 pieces communicate, and there are 3 numbers"):
        schedules(Case("our_llama", replicas=(2, 3, 2)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_loss_whose_logits_are_kept_is_split_by_its_rows(batch, monkeypatch):
    def losses():
        split, _ = schedules(Case("our_llama", batch=batch, numerics="fast"))
        steps = [step.target for t in split.templates.values() for step in t.steps]
        refused = [note for note in split.notes if note.by == "replicas" and note.is_refusal]
        return [x for x in steps if "cross_entropy" in x], "\n".join(map(str, refused))

    made, _ = losses()
    assert made == 2 * ["plait.linear_cross_entropy_rows.default"]
    monkeypatch.setattr(linear_cross_entropy, "GROUP_ELEMENTS", 1000)
    made, reasons = losses()
    assert made == ["plait.linear_cross_entropy.default"]
    assert "holds the logits of a group at a time" in reasons


# In fast numerics a product of fewer rows may be summed otherwise, in another kernel.
FAST = {torch.float32: 2e-5, BF16: 1e-1}


@pytest.mark.parametrize("case", [replace(QUICK[i], numerics="fast") for i in (2, 5)], ids=str)
def test_fast_numerics_stay_within_the_tolerance(case):
    found, expected, _ = both(case)
    differences = differing(found, expected)
    count = sum(each.count for each in differences)
    total = sum(x.numel() for ranks in expected.values() for x in ranks)
    worst = max((each.relative for each in differences), default=0.0)
    sys.stdout.write(f"{case}: {count} of {total} values differ, by up to {worst:.1e}\n")
    assert worst < FAST[case.dtype]


def test_experts_on_shared_tokens_are_refused_by_name():
    case = Case("mixtral", sp=True)
    with pytest.raises(PlanError, match=r"aten.sort.default.*it sorts tokens.*sp=False"):
        schedules(case)

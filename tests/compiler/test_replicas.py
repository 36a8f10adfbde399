"""A step in replicas has the bits of the same step unsplit: loss, and every gradient of each rank.

All ranks are computed in one process, with true collectives (`LocalTensorMode`). Strict numerics.
"""

import sys

import pytest
import torch

from tests.compiler.replica_models import Case, both, differing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

# Under sequence parallelism a rank holds other tokens when they are split, so what it adds up over
# its own tokens, for the weight of a norm or the bias after a scatter, has other terms; the sum
# over ranks then has the same terms, grouped otherwise.
REGROUPED = {torch.float32: 1e-6, torch.bfloat16: 3e-2}

QUICK = [
    Case("our_llama", sp=True, replicas=4),
    Case("llama", tp=4, replicas=3),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_loss_and_every_gradient_have_the_bits_of_the_unsplit_step(case):
    found, expected, _ = both(case)
    regrouped = 0
    for difference in differing(found, expected):
        x = expected[difference.name][difference.rank]
        assert case.sp, difference
        assert x.dim() == 1, difference
        assert difference.relative < REGROUPED[case.dtype], difference
        regrouped += 1
    sys.stdout.write(f"{case}: {len(expected)} tensors on {case.tp} ranks, {regrouped} regrouped\n")

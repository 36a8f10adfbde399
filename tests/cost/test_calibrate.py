from dataclasses import replace

import pytest
import torch

from plait.cost.calibrate import fit_device
from plait.cost.clusters import cpu
from plait.cost.operations import Cost, Kind, operation_s

KNOWN = replace(
    cpu().device,
    peak_flops_per_s={torch.float32: 3e11, torch.bfloat16: 9e11},
    memory_bandwidth_bytes_per_s=4e9,
    attention_efficiency=0.2,
)
COSTS = [
    Cost(kind=Kind.MEMORY, bytes=10**8),
    Cost(kind=Kind.MEMORY, bytes=3 * 10**7),
    *(
        Cost(kind=Kind.MATRIX, flops=2 * m * k * n, sizes=(m, k, n), dtype=dtype)
        for m, k, n in ((512, 1024, 1024), (2048, 256, 1024))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Cost(kind=Kind.ATTENTION, flops=10**10),
    Cost(kind=Kind.FREE),
]


def test_a_device_is_found_again_from_the_times_that_it_gives():
    found = fit_device(cpu().device, [(cost, operation_s(cost, KNOWN)) for cost in COSTS])
    assert found.memory_bandwidth_bytes_per_s == pytest.approx(4e9)
    assert found.peak(torch.float32) == pytest.approx(3e11)
    assert found.peak(torch.bfloat16) == pytest.approx(9e11)
    assert found.attention_efficiency == pytest.approx(0.2)


def test_what_no_sample_speaks_of_stays():
    device = cpu().device
    assert fit_device(device, []) == device
    found = fit_device(device, [(COSTS[0], 1.0)])
    assert found == replace(device, memory_bandwidth_bytes_per_s=10**8)


def test_times_of_each_kind_add_up_as_measured_even_if_no_device_gives_each_of_them():
    measured = [(cost, 2.5 * (i + 1) * operation_s(cost, KNOWN)) for i, cost in enumerate(COSTS)]
    device = fit_device(cpu().device, measured)
    for kind in (Kind.MEMORY, Kind.ATTENTION):
        same = [(cost, time_s) for cost, time_s in measured if cost.kind is kind]
        total_s = sum(time_s for _, time_s in same)
        assert sum(operation_s(cost, device) for cost, _ in same) == pytest.approx(total_s)
    for dtype in (torch.float32, torch.bfloat16):
        same = [x for x in measured if x[0].kind is Kind.MATRIX and x[0].dtype == dtype]
        total_s = sum(time_s for _, time_s in same)
        assert sum(operation_s(cost, device) for cost, _ in same) == pytest.approx(total_s)

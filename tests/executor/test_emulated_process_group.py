"""Emulated collectives: on a GPU they take its time, without one they are refused.

What stands for them on a CPU is in test_delayed_process_group.py.
"""

import pytest
import torch
import torch.distributed._functional_collectives as functional

from plait.cost.clusters import Link
from plait.errors import PlanError
from plait.executor.delayed_process_group import registered
from plait.executor.emulated_process_group import EmulatedProcessGroup

LINK = Link(latency_s=0.02, bandwidth_bytes_per_s=1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_emulate_on():
    with pytest.raises(PlanError, match="emulated collectives run on a GPU, and there is none"):
        EmulatedProcessGroup(0, 4, LINK, num_blocks=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_blocks", [0, 8])
def test_a_message_takes_its_time_beside_the_computation_and_keeps_the_data(num_blocks):
    group = EmulatedProcessGroup(0, 4, LINK, num_blocks=num_blocks)
    x = torch.arange(1024.0, device="cuda")
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with registered({"tp": group}):
        torch.cuda.synchronize()
        began.record()
        summed = torch.ops._c10d_functional.all_reduce(x, "sum", "tp")
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, 4, "tp")
        ended.record()
        torch.cuda.synchronize()
        assert began.elapsed_time(ended) < 5  # ms; the computing stream waits for nobody
        summed, gathered = (functional.wait_tensor(each) for each in (summed, gathered))
        waited = torch.cuda.Event(enable_timing=True)
        waited.record()
        torch.cuda.synchronize()
    assert began.elapsed_time(waited) >= 2 * 20 * 0.95  # one after the other
    assert torch.equal(summed, x)
    assert torch.equal(gathered, x.repeat(4))

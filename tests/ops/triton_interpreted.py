"""Run Triton kernels on CPU tensors, in Triton's interpreter, and print their errors as JSON.

A program of its own: the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported.
"""

import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.ops import rms_norm, row_losses, triton_kernels


def norm_errors(dtype: torch.dtype, has_sum: bool) -> list[float]:
    """Largest errors of both gradients, relative to the largest value."""
    x, dnormed, dsum = (torch.randn(9, 37).to(dtype) for _ in range(3))
    weight, scale = torch.randn(37).to(dtype), torch.rand(9) + 0.5
    given = (dnormed, dsum if has_sum else None, x, scale, weight)
    found = triton_kernels.norm_gradients(*given, 1.0, num_programs=4)
    exact = rms_norm._gradients(*(None if t is None else t.double() for t in given), 1.0)
    return [_error(mine, truth) for mine, truth in zip(found, exact, strict=True)]


def loss_errors(dtype: torch.dtype, soft_cap: float) -> list[float]:
    """Errors of the loss and of the gradients of the logits; some rows are left out."""
    triton_kernels._BLOCK_COLUMNS = 16  # several blocks for each row
    logits, targets = (3 * torch.randn(7, 43)).to(dtype), torch.randint(0, 43, (7,))
    targets[2] = -100
    exact = logits.double().requires_grad_()
    capped = soft_cap * torch.tanh(exact / soft_cap) if soft_cap else exact
    loss = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    without = triton_kernels.losses_to_gradients(logits, targets, False, soft_cap)
    found = triton_kernels.losses_to_gradients(logits, targets, True, soft_cap)
    return [_error(without, loss), _error(found, loss), _error(logits, gradient)]


def check_fakes() -> None:
    """On fake tensors nothing is launched, and results have their forms."""
    with FakeTensorMode():
        rows, targets = torch.empty(7, 43), torch.empty(7, dtype=torch.int64)
        assert triton_kernels.losses_to_gradients(rows, targets, True, 0.0).shape == (7,)
        given = (rows, None, rows, torch.empty(7), torch.empty(43))
        found = triton_kernels.norm_gradients(*given, 1.0, num_programs=4)
        assert [x.shape for x in found] == [(7, 43), (43,)]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    torch.manual_seed(0)
    assert row_losses.triton_kernels() is triton_kernels
    check_fakes()
    cases = [
        (str(dtype), function.__name__, function(dtype, setting))
        for dtype in (torch.float32, torch.bfloat16)
        for function, settings in ((norm_errors, (False, True)), (loss_errors, (0.0, 2.5)))
        for setting in settings
    ]
    sys.stdout.write(json.dumps(cases))

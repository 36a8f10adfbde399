"""Known architectures at O1: as close to float64 as eager is, but for a stated factor."""

import pytest
import torch

import plait

from .families import FAMILIES
from .program import SEED

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
IN_EVERY_RUN = {"plait_llama_autocast"}
BFLOAT16 = 0.05
FLOAT32 = 2e-4
"""Of a gradient, relative by norm to eager's: four layers of roundings of 2^-8 and 2^-24, where the
smallest gradients cancel; eager itself is as far from float64."""


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in IN_EVERY_RUN else pytest.mark.exhaustive) for n in FAMILIES],
)
def test_a_training_step_at_o1_is_eagers_but_for_rounding(name):
    torch.manual_seed(SEED)
    model, arguments = FAMILIES[name]()
    expected = _step(model, model, arguments)
    compiled = plait.jit(model, level="O1", cache=False)
    found = _step(compiled, model, arguments)
    tolerance = BFLOAT16 if "autocast" in name else FLOAT32
    assert abs(found["loss"] - expected["loss"]) <= tolerance * abs(expected["loss"])
    scale = max(gradient.norm() for gradient in expected["gradients"].values())
    for key, gradient in expected["gradients"].items():
        error = (found["gradients"][key] - gradient).norm()
        assert error <= tolerance * gradient.norm() + 1e-6 * scale, key
    report = compiled.report()
    assert report.islands
    assert not any("runs as O0" in line for line in report.islands)


def _step(run, model, arguments):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    loss = run(**arguments)["loss"]
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }
    return {"loss": loss.item(), "gradients": gradients}

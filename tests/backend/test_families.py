"""Known architectures train compiled as they do without: every bit of outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait

from .families import FAMILIES
from .program import SEED, differences, snapshot, unpack

# Dynamo itself reads .grad of a tensor that is no leaf where it resumes after a break; GPT-2 breaks
# once, at a warning about its kind of loss.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

SLOW = {"gpt2_scaled_by_layer", "mixtral", "t5", "bart", "jetmoe"}
SLOW |= {"plait_gemma3_autocast", "plait_mixtral_autocast", "plait_deepseek_v3"}
WHOLE = {"albert", "jetmoe", "t5"}
"""Those that are not captured block by block: ALBERT calls one layer again and again, JetMoE asks
for values, and a block of T5 returns what it was given."""
STEPS = 2


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FAMILIES]
)
def test_a_compiled_training_step_has_the_bits_of_the_eager_one(name):
    torch.manual_seed(SEED)
    model, arguments = FAMILIES[name]()
    expected = [_step(model, model, arguments, step) for step in range(STEPS)]
    compiled = plait.jit(model)
    found = [_step(compiled, model, arguments, step) for step in range(STEPS)]
    assert differences(expected, found) == []
    report = compiled.report()
    in_blocks = any(graph.num_templates for graph in report.graphs)
    assert in_blocks == (name not in WHOLE), (report.whole_graphs, report.flat_blocks)


def _step(run, model: nn.Module, arguments: dict[str, Any], step: int) -> dict[str, Any]:
    """Forward, loss, backward; a gradient that eager leaves out is a zero one."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED + step)
    output = run(**arguments)
    output["loss"].backward()
    gradients = {
        name: snapshot(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }
    tensors = [leaf for leaf in unpack(dict(output)) if isinstance(leaf, Tensor)]
    return {"outputs": snapshot(tensors), "gradients": gradients, "draw": torch.rand(()).item()}


@pytest.mark.parametrize("name", ["gemma2", "mistral", "exaone4"])
def test_a_training_step_that_fills_a_cache_has_the_bits_of_the_eager_one(name):
    torch.manual_seed(SEED)
    model, arguments = FAMILIES[name]()
    arguments = {key: x for key, x in arguments.items() if key != "use_cache"}

    def step(run):
        torch.manual_seed(SEED)
        model.zero_grad(set_to_none=True)
        output = run(**arguments)
        output.loss.backward()
        keys = [layer.keys for layer in output.past_key_values.layers]
        return snapshot([output.loss, output.logits, *keys, *(p.grad for p in model.parameters())])

    assert differences(step(model), step(plait.jit(model))) == []

"""A spread model is still one graph, with as few collectives as its layers need."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch._dynamo.functional_export import dynamo_graph_capture_for_export
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.graph.capture import capture
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.plan.parallel_plan import ParallelPlan
from tests.graph.spread_models import MODELS, hugging_face, loss, own, tokens

# Dynamo makes an instance of each autograd function; transformers sets a global in its forward.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

GATHER, SCATTER, SUM = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens_BT):
        return loss(self.model, tokens_BT)


def collectives(*modules):
    names = [str(node.target) for module in modules for node in module.graph.nodes]
    wanted = [n.split(".")[1] for n in names if n.startswith("_c10d_functional.")]
    return Counter(n for n in wanted if n != "wait_tensor")


def of_step(name, plan, *, is_local):
    """The collectives of the joint graph of a spread fake copy."""
    with FakeTensorMode() as mode:
        model = MODELS[name]()
    with plan_mesh(plan) as mesh, ExitStack() as stack:
        with mode:
            parallelize(model, plan, mesh)
            if is_local:
                keep_local_parameters(model)
            inputs = (torch.zeros(2, 16, dtype=torch.int64),)
        module = dynamo_graph_capture_for_export(Step(model))(*inputs)
        stack.enter_context(tracing(module.meta["tracing_context"]))
        joint = aot_export_joint_with_descriptors(stack, module, inputs).graph_module
    return collectives(joint)


# Two layers: attention and MLP each take one sum forward and one backward. Shared tokens: a gather
# and a scatter in place of each, the embedding's gather backward, the final gather forward; and a
# sum for each weight or bias that sees own tokens only.
@pytest.mark.parametrize(
    "is_local",
    [
        pytest.param(False, id="dtensors", marks=pytest.mark.exhaustive),
        pytest.param(True, id="local"),
    ],
)
@pytest.mark.parametrize(
    ("name", "sp", "expected"),
    [
        ("our_llama", False, {SUM: 8}),
        ("our_llama", True, {GATHER: 10, SCATTER: 8, SUM: 5}),
        pytest.param("our_qwen3", False, {SUM: 8 + 4}, marks=pytest.mark.exhaustive),
        ("llama", True, {GATHER: 10, SCATTER: 8, SUM: 5}),
        ("gpt2", True, {GATHER: 10, SCATTER: 8, SUM: 2 * (4 + 2) + 2}),
        pytest.param("phi3", False, {SUM: 8}, marks=pytest.mark.exhaustive),
        ("olmo2", False, {SUM: 8 + 2 * 4}),
    ],
)
def test_each_layer_exchanges_what_it_must_and_no_more(name, sp, expected, is_local):
    assert of_step(name, ParallelPlan(tp=4, sp=sp), is_local=is_local) == expected


@pytest.mark.parametrize(
    ("name", "sp", "num_kinds"),
    [("our_llama", False, 1), ("our_llama", True, 1), ("llama", True, 2)],
    ids=["ours-tp", "ours-sp", "llama-sp"],
)
def test_layers_are_blocks_and_are_captured_once(name, sp, num_kinds):
    """(Of a Hugging Face model, the first layer is a kind of its own: it takes all tokens.)"""
    plan = ParallelPlan(tp=2, sp=sp)
    with plan_mesh(plan) as mesh:
        model = (
            own(num_layers=4) if name == "our_llama" else hugging_face("Llama", num_hidden_layers=4)
        )
        graph = capture(
            keep_local_parameters(parallelize(model, plan, mesh)), tokens()[:1], loss=loss
        )
    blocks = [t for t in graph.templates.values() if t.block.endswith("DecoderLayer")]
    assert len(blocks) == num_kinds
    expected = Counter({GATHER: 4, SCATTER: 4, SUM: 2} if sp else {SUM: 4})
    for block in blocks:
        takes_all = block.arguments[0].shape[1] == 16 and sp
        found = collectives(block.forward, block.backward)
        assert found == expected + Counter({GATHER: 1} if takes_all else {})

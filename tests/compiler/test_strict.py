"""Strict numerics for captured graphs: rows do not depend on how many rows there are."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import plait
from plait.compiler.levels import TOLERANCE
from plait.compiler.strict import strict_numerics
from plait.errors import GraphError
from plait.graph.display import to_text
from plait.graph.storage import from_json, to_json
from plait.graph.verify import verify_pass
from plait.graph.verify_schedule import verify_schedule
from plait.nn.feed_forward import FeedForward
from plait.nn.norm import RMSNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_ROWS = 256


class Residual(nn.Module):
    """Two layers x + mlp(norm(x)), so that they are calls of a template."""

    def __init__(self, make_norm, make_mlp):
        super().__init__()
        self.layers = nn.ModuleList(Layer(make_norm(), make_mlp()) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def plait_llama(width):
    return Residual(
        lambda: RMSNorm(width, eps=1e-5), lambda: FeedForward(width, 2 * width, bias=False)
    )


def llama(width):
    config = hf.LlamaConfig(hidden_size=width, num_attention_heads=2, intermediate_size=2 * width)
    return Residual(lambda: LlamaRMSNorm(width), lambda: LlamaMLP(config))


def gpt2(width):
    config = hf.GPT2Config(n_embd=width, n_head=4, resid_pdrop=0.0)
    return Residual(lambda: nn.LayerNorm(width), lambda: GPT2MLP(2 * width, config))


def gemma2(width):
    config = hf.Gemma2Config(hidden_size=width, num_attention_heads=2, intermediate_size=2 * width)
    return Residual(lambda: Gemma2RMSNorm(width), lambda: Gemma2MLP(config))


BLOCKS = (plait_llama, llama, gpt2, gemma2)


def made(block, width, dtype, scale=1.0):
    torch.manual_seed(0)
    model = block(width).to(dtype)
    for p in model.parameters():  # Conv1D starts small, Gemma's norms at zero: make all tell
        p.data.add_(torch.randn_like(p) * 0.5 * width**-0.5)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(NUM_ROWS, width, generator=generator).to(dtype) for _ in range(2))
    return model, x * scale, dy


def output_and_gradients(model, x, dy, numerics):
    """The captured forward of these rows, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    schedule = plait.compile(plait.capture(model, x), numerics=numerics)
    return lambda: run_both(schedule, model, x, dy)


def run_both(schedule, model, x, dy):
    y = plait.run(schedule, model, x)
    dx, *dweights = torch.autograd.grad(y, [x, *model.parameters()], dy)
    return y.detach(), dx, dweights


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [64, 100, pytest.param(1024, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("block", BLOCKS)
def test_rows_do_not_depend_on_how_many_there_are(block, width, dtype, threads):
    model, x, dy = made(block, width, dtype)
    generator = torch.Generator().manual_seed(2)
    some_rows = torch.randperm(NUM_ROWS, generator=generator)
    parts = [slice(0, 2), slice(0, 64), some_rows[:117], slice(61, 253)]
    whole = output_and_gradients(model, x, dy, "strict")
    some = [output_and_gradients(model, x[rows], dy[rows], "strict") for rows in parts]
    for num_threads in (1, 2):
        threads(num_threads)
        y, dx, _ = whole()
        for rows, run in zip(parts, some, strict=True):
            some_y, some_dx, _ = run()
            assert torch.equal(some_y, y[rows])
            assert torch.equal(some_dx, dx[rows])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_results_are_eager_s_within_the_stated_tolerance(block, dtype):
    model, x, dy = made(block, 1024, dtype)
    y, dx, dweights = output_and_gradients(model, x, dy, "strict")()
    x.requires_grad_()
    eager_y = model(x)
    eager = [eager_y, *torch.autograd.grad(eager_y, [x, *model.parameters()], dy)]
    for found, expected in zip([y, dx, *dweights], eager, strict=True):
        bound = TOLERANCE * torch.finfo(dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("width", [100, 1024])
def test_without_the_pass_rows_do_depend_on_it(width, threads):
    threads(1)
    model, x, dy = made(llama, width, torch.float32)
    y, dx, _ = output_and_gradients(model, x, dy, "fast")()
    unequal = 0
    for num_rows in (2, 61, 117, 192):
        some_y, some_dx, _ = output_and_gradients(model, x[:num_rows], dy[:num_rows], "fast")()
        unequal += not torch.equal(some_y, y[:num_rows])
        unequal += not torch.equal(some_dx, dx[:num_rows])
    assert unequal, "this machine is row-exact by itself: the tests above show nothing here"


class Odd(nn.Module):
    """A weight on the left, weights of a batch, a scaled sum, attention, what nobody measured."""

    def __init__(self, width):
        super().__init__()
        self.left = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.experts = nn.Parameter(torch.randn(2, width, width) * width**-0.5)

    def forward(self, x):
        y = (self.left.double().float() @ x.t()).t()
        y = torch.bmm(torch.stack((y, x)), self.experts).sum(0)
        y = torch.sub(y, x, alpha=0.3)
        scores = (y @ x.t()).softmax(-1)
        return torch.celu(y) + (scores * 0).sum(-1, keepdim=True)


def test_every_form_of_product_is_made_strict_or_named(threads):
    torch.manual_seed(0)
    model = Odd(64)
    x = torch.randn(NUM_ROWS, 64).requires_grad_()
    schedule = plait.compile(plait.capture(model, x), numerics="strict")
    some = plait.compile(plait.capture(model, x[:99].detach()), numerics="strict")
    torch.testing.assert_close(plait.run(schedule, model, x), model(x))
    for num_threads in (1, 2):
        threads(num_threads)
        y, some_y = plait.run(schedule, model, x), plait.run(some, model, x[:99])
        assert torch.equal(y[:99], some_y)
    done = {note.operator: note.count for note in schedule.notes if not note.is_refusal}
    assert done == {
        "aten.mm.default": 2,
        "aten.bmm.default": 2,
        "aten.sub.Tensor": 1,
        "aten.elu_backward.default": 1,
    }
    left = {note.operator: note for note in schedule.notes if note.is_refusal}
    assert left["aten.mm.default"].count == 4
    assert "a weight gradient or attention" in left["aten.mm.default"].text
    assert "nobody measured" in left["aten.celu.default"].text


def test_a_pass_keeps_the_graph_s_rules_and_says_what_it_did():
    model, x, _ = made(llama, 64, torch.float32)
    graph = plait.capture(model, x, loss=lambda model, x: model(x).square().mean())
    strict = strict_numerics(graph)
    verify_pass(graph, strict)
    assert graph.notes == ()
    schedule = plait.compile(graph, plait.ParallelPlan(recompute="full"), numerics="strict")
    verify_schedule(schedule)
    assert schedule.numerics == "strict"
    assert from_json(to_json(schedule)) == schedule
    layers = [each for each in graph.templates.values() if each.block == "Layer"]
    (silu,) = (note for note in schedule.notes if note.operator == "aten.silu.default")
    assert (silu.count, silu.is_refusal) == (len(layers), False)
    assert str(silu) in schedule.report().splitlines()
    assert str(silu) in to_text(strict).splitlines()


def test_a_whole_graph_without_templates_is_rewritten(threads):
    torch.manual_seed(0)

    class Counting(nn.Module):
        """A buffer that changes in place: captured as a whole."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return torch.nn.functional.silu(self.linear(x))

    model, x = Counting(), torch.randn(NUM_ROWS, 64)
    graph = plait.capture(model, x)
    assert not graph.templates
    schedule = plait.compile(graph, numerics="strict")
    some = plait.compile(plait.capture(model, x[:99].detach()), numerics="strict")
    assert torch.equal(plait.run(schedule, model, x)[:99], plait.run(some, model, x[:99]))
    assert {note.operator for note in schedule.notes if not note.is_refusal} == {
        "aten.addmm.default",
        "aten.silu.default",
        "aten.silu_backward.default",
    }


def test_unknown_numerics_are_refused():
    model, x, _ = made(llama, 64, torch.float32)
    with pytest.raises(GraphError, match=r"there are no numerics 'exact'.*fast.*strict"):
        plait.compile(plait.capture(model, x), numerics="exact")

"""Level O1: which operators become islands, and that nothing passes a collective."""

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import AdamW

import plait
from plait.compiler.fuse import fuse_module
from plait.compiler.group import group
from plait.compiler.levels import ISLANDS, has_islands, passes_of
from plait.compiler.lower import Lowering
from plait.compiler.verify_fused import verify_fused
from plait.cost import clusters
from plait.cost.clusters import Link
from plait.errors import GraphError
from plait.executor.delayed_process_group import delayed_groups
from plait.graph.graph import module_of
from plait.graph.island import expanded, island_of, looks_only
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.storage import from_json, to_json
from plait.graph.verify_schedule import verify_schedule
from tests.compiler.replica_models import Case
from tests.compiler.test_tokens import pytestmark
from tests.graph.spread_models import loss

__all__ = ["pytestmark"]


def traced(function, *inputs):
    """A module whose only output is a tuple, with values, as capture makes them."""
    return make_fx(lambda *x: tuple(function(*x)), tracing_mode="fake")(*inputs)


def targets(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def norm_and_product(x, w):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    h = normed @ w
    return (torch.nn.functional.silu(h) * h,)


def test_neighbouring_operators_become_one_island_and_a_product_stands_alone():
    islands = {}
    module = fuse_module(traced(norm_and_product, torch.ones(4, 8), torch.ones(8, 8)), islands)
    kinds = [island_of(node) is not None for node in module.graph.nodes if not looks_only(node)]
    assert sum(kinds) == 2
    assert targets(module).count("aten.mm.default") == 1
    assert sorted(found.num_operators for found in islands.values()) == [2, 5]


def test_operators_on_both_sides_of_a_product_are_never_one_island():
    def function(x, w):
        a = x.sin()
        return (a + (a.cos() @ w).exp().neg(),)

    module = traced(function, torch.ones(4, 4), torch.ones(4, 4))
    for members in group(module):
        before = {n for n in members if "sin" in n.name or "cos" in n.name}
        assert before in (set(), set(members))


def test_an_island_that_recurs_is_known_once():
    def function(x):
        for _ in range(3):
            x = (x.sin() * 2 + 1) @ x
        return (x,)

    islands = {}
    module = fuse_module(traced(function, torch.ones(4, 4)), islands)
    assert sum(island_of(node) is not None for node in module.graph.nodes) == 3
    assert len(islands) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.nn.functional.dropout(x) * 2 + 1,),
        lambda x: (x.sin().cumsum(0).cos() + 1,),
        lambda x: (x.sort().values.sin().cos(), x.sum() + 1),
    ],
    ids=["dropout", "cumsum", "sort"],
)
def test_islands_hold_no_operator_that_draws_or_is_unknown(function):
    islands = {}
    fuse_module(traced(function, torch.ones(4, 4)), islands)
    held = {target for found in islands.values() for target in targets(found.module)}
    assert not held & {"aten.bernoulli_.float", "aten.cumsum.default", "aten.sort.default"}


def test_the_expanded_module_computes_the_same_bits():
    inputs = torch.randn(4, 8), torch.randn(8, 8)
    module = traced(norm_and_product, *inputs)
    islands = {}
    again = expanded(fuse_module(module, islands), islands)
    for x, y in zip(module(*inputs), fx.GraphModule(again, again.graph)(*inputs), strict=True):
        assert x.equal(y)


def test_an_operator_moved_across_a_collective_is_found():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(4)
    sine = graph.call_function(torch.ops.aten.sin.default, (x,))
    started = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "tp"))
    waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (started,))
    total = graph.call_function(torch.ops.aten.add.Tensor, (sine, waited))
    graph.output((total,))
    before = module_of(nn.Module(), graph)
    verify_fused(before, before, {})
    other = fx.Graph()
    copies = {}
    for node in (x, started, sine, waited, total):
        copies[node] = other.node_copy(node, lambda n: copies[n])
    other.output((copies[total],))
    with pytest.raises(GraphError, match="from one side of a collective"):
        verify_fused(before, module_of(nn.Module(), other), {})


def test_a_split_and_ordered_graph_keeps_its_collectives_in_their_places():
    case = Case("our_llama", sp=True, replicas=2, numerics="fast")
    graph = plait.capture(case.model(), case.tokens(), case.plan(), loss=loss)
    ordered = graph
    for each in passes_of("O1", plan=case.plan()):
        if each is not ISLANDS:
            ordered = each(ordered, case.plan(), clusters.cpu(case.tp))
    fused = ISLANDS(ordered, case.plan(), clusters.cpu(case.tp))
    assert fused.islands
    before, after = (schedule_of(each) for each in (ordered, fused))
    for name, program in after.items():
        assert communication(program) == communication(before[name])
        assert segments(program) == segments(before[name])


def schedule_of(graph):
    lowering = Lowering()
    return {k: v for t in graph.templates.values() for k, v in lowering.template(t).items()}


def communication(program):
    return [s.target for s in program.steps if s.target.startswith("_c10d")]


def segments(program):
    """Products between two communications: they are neither fused nor moved."""
    found = [0]
    for step in program.steps:
        if step.target.startswith("_c10d"):
            found.append(0)
        found[-1] += step.target == "aten.mm.default"
    return found


def test_strict_numerics_refuse_islands_and_say_so():
    model, tokens = nn.Linear(8, 8), torch.ones(3, 8)
    graph = plait.capture(model, tokens, loss=lambda m, x: m(x).sin().cos().sum())
    schedule = plait.compile(graph, level="O1", numerics="strict")
    assert not schedule.islands
    assert "strict numerics" in schedule.report()
    assert "rounds a row by its place" in schedule.report()


def test_levels_with_islands_are_known():
    assert not has_islands("O0")
    assert has_islands("O1")
    with pytest.raises(GraphError, match="O1"):
        passes_of("O9")


@pytest.fixture(scope="module")
def step():
    """A model, its batch and the captured step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.LayerNorm(32), nn.Linear(32, 4))
    x = torch.randn(6, 16)

    def cross_entropy(model, x):
        return torch.nn.functional.cross_entropy(model(x), torch.arange(6) % 4)

    return model, x, plait.capture(model, x, loss=cross_entropy)


def test_a_stored_schedule_with_islands_runs_and_trains_with_an_unmodified_adamw(step):
    model, x, graph = step
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    schedule = plait.compile(graph, level="O1", optimizer=optimizer)
    schedule = from_json(to_json(schedule))
    verify_schedule(schedule)
    assert any("_fused_adamw_" in s.target for s in schedule.programs["optimizer"].steps)
    found = [plait.run(schedule, model, x, optimizer=optimizer).item() for _ in range(4)]
    assert found == sorted(found, reverse=True)
    assert "compiled" in schedule.report()


def test_an_island_that_does_not_exist_is_found_in_a_schedule(step):
    schedule = plait.compile(step[2], level="O1")
    schedule.islands.clear()
    with pytest.raises(GraphError, match="there is no island"):
        verify_schedule(schedule)


def test_a_split_and_ordered_step_at_o1_computes_what_o0_does():
    case = Case("our_llama", sp=True, replicas=2, numerics="fast")
    graph = plait.capture(case.model(), case.tokens(), case.plan(), loss=loss)
    found = []
    for level in ("O0", "O1"):
        schedule = plait.compile(graph, case.plan(), level=level)
        with plan_mesh(plait.ParallelPlan(tp=case.tp)) as mesh:
            model = keep_local_parameters(parallelize(case.model(), case.plan(), mesh))
        link = Link(latency_s=1e-5, bandwidth_bytes_per_s=1e10)
        with delayed_groups({"tp": case.tp}, link) as groups:
            value = plait.run(schedule, model, case.tokens())
        found.append([value.double(), *(p.grad.double() for p in model.parameters())])
        assert groups["tp"].transfers
    for x, y in zip(*found, strict=True):
        # Float32 sums in another order; a gradient of a few summands that cancel.
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-7

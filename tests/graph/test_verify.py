"""Each rule of a graph, broken on a captured training step: the message names place and rule."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed import _functional_collectives as collectives

from plait.compiler.compile import compile as compile_graph
from plait.compiler.recompute import recompute
from plait.errors import GraphError
from plait.graph.capture import capture
from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, Shard, call_of
from plait.graph.schedule import Program, Ref, Schedule, refs_in
from plait.graph.verify import verify, verify_pass
from plait.graph.verify_schedule import verify_schedule
from plait.plan.parallel_plan import Recompute

from .programs import WIDTH, Block, Tower, captured_step

ATEN = torch.ops.aten


@pytest.fixture(scope="module")
def step():
    return captured_step()


@pytest.fixture
def graph(step):
    return step.copy()


def block(graph: Graph):
    """The template that is called most."""
    called = [call[0] for node in graph.root.graph.nodes if (call := call_of(node))]
    return graph.templates[max(called, key=called.count)]


def calls(graph: Graph, part: str, name: str | None = None):
    wanted = (name or block(graph).name, part)
    return [node for node in graph.root.graph.nodes if call_of(node) == wanted]


def find(module, target):
    return module.graph.find_nodes(op="call_function", target=target)[0]


def set_operand(node, position, operand):
    args = list(node.args)
    args[position] = operand
    node.args = tuple(args)


def set_value(template, name, position, **changes):
    values = list(getattr(template, name))
    values[position] = replace(values[position], **changes)
    setattr(template, name, tuple(values))


def use_before_it_is_made(graph):
    forward = block(graph).forward
    relu, add = find(forward, ATEN.relu.default), find(forward, ATEN.add.Tensor)
    set_operand(relu, 0, add)


def two_nodes_of_one_name(graph):
    first, second = calls(graph, FORWARD)[:2]
    second._rename(first.name)
    second.name = first.name


def a_node_of_another_graph(graph):
    template = block(graph)
    foreign = find(template.forward, ATEN.relu.default)
    set_operand(find(template.backward, ATEN.threshold_backward.default), 1, foreign)


def an_attribute_that_is_gone(graph):
    root = graph.root.graph
    with root.inserting_before(calls(graph, FORWARD)[0]):
        node = root.create_node("get_attr", "nowhere", name="nowhere")
    node.meta["val"] = calls(graph, FORWARD)[0].args[2].meta["val"]


def an_unknown_template(graph):
    set_operand(calls(graph, FORWARD)[0], 0, "Nobody")


def a_part_that_no_template_has(graph):
    set_operand(calls(graph, BACKWARD)[0], 1, "sideways")


def too_few_operands(graph):
    node = calls(graph, FORWARD)[0]
    node.args = node.args[:-1]


def an_operand_of_another_shape(graph):
    node = calls(graph, FORWARD)[0]
    set_operand(node, 3, node.args[5])


def an_operand_of_another_dtype(graph):
    set_value(block(graph), "arguments", 1, dtype=torch.float64)
    node = block(graph).forward.graph.find_nodes(op="placeholder")[1]
    node.meta["val"] = node.meta["val"].double()


def an_operand_of_another_layout(graph):
    node = calls(graph, FORWARD)[0].args[2]
    node.meta["val"] = replace(node.meta["val"], layout=Shard(0))


def a_result_that_is_not_there(graph):
    part = next(iter(calls(graph, FORWARD)[0].users))
    set_operand(part, 1, 99)


def a_call_used_as_a_whole(graph):
    first, second = calls(graph, FORWARD)[:2]
    part = next(iter(second.users))
    part.target, part.args = torch.relu, (first,)


def saved_values_of_another_layer(graph):
    one, other = calls(graph, BACKWARD)[:2]
    position = next(
        i for i, v in enumerate(block(graph).saved) if v.role is Role.SAVED and len(v.shape) == 2
    )
    set_operand(one, 2 + position, other.args[2 + position])


def a_saved_argument_of_another_layer(graph):
    one, other = calls(graph, BACKWARD)[:2]
    set_operand(one, 3, other.args[3])


def a_saved_value_of_another_form(graph):
    template = block(graph)
    position = next(i for i, value in enumerate(template.saved) if value.role is Role.INPUT)
    set_value(template, "saved", position, shape=(7, 7))


def a_forward_that_does_not_save(graph):
    output = block(graph).forward.graph.output_node()
    output.args = (output.args[0][:-1],)


def a_gradient_too_few(graph):
    template = block(graph)
    template.gradients = template.gradients[:-1]


def a_gradient_of_another_shape(graph):
    outputs = list(graph.outputs)
    position = next(i for i, value in enumerate(outputs) if value.role is Role.GRADIENT)
    name = next(v.name for v in graph.inputs if v.shape == (12, 6))
    outputs[position] = replace(outputs[position], name=name)
    graph.outputs = tuple(outputs)


def a_gradient_of_nothing(graph):
    *rest, last = graph.outputs
    graph.outputs = (*rest, replace(last, name="layers.9.norm.weight"))


def a_tangent_of_nothing(graph):
    *rest, last = graph.inputs
    graph.inputs = (*rest, replace(last, name="7"))


def a_forward_call_that_takes_a_gradient(graph):
    name = block(graph).name
    gradient = next(iter(calls(graph, BACKWARD)[0].users))
    root = graph.root.graph
    with root.inserting_after(gradient):
        again = calls(graph, FORWARD)[0]
        root.call_function(again.target, (name, FORWARD, gradient, *again.args[3:]))


def a_result_that_the_backward_makes(graph):
    template = block(graph)
    (outputs,) = template.joint.graph.output_node().args
    template.joint.graph.output_node().args = ((outputs[1], *outputs[1:]),)


def a_tangent_of_another_shape(graph):
    *_, tangent = block(graph).backward.graph.find_nodes(op="placeholder")
    tangent.meta["val"] = tangent.meta["val"][:2]


def a_tangent_too_many(graph):
    block(graph).differentiable = ()


def an_operator_in_place(graph):
    find(block(graph).forward, ATEN.relu.default).target = ATEN.relu_.default


def a_node_without_a_value(graph):
    del find(block(graph).forward, ATEN.relu.default).meta["val"]


def outputs_in_another_order(graph):
    loss, *gradients = graph.outputs
    graph.outputs = (loss, *reversed(gradients))


def an_input_that_nobody_described(graph):
    graph.inputs = graph.inputs[1:]


def random_numbers_drawn_twice(graph):
    backward = block(graph).backward
    mask = find(backward, ATEN.native_dropout_backward.default)
    drawn = find(block(graph).forward, ATEN.native_dropout.default)
    with backward.graph.inserting_before(mask):
        again = backward.graph.call_function(drawn.target, (mask.args[0], *drawn.args[1:]))
    again.meta["val"] = drawn.meta["val"]


def a_template_under_another_name(graph):
    graph.templates["Other"] = next(iter(graph.templates.values()))


BREAKAGES = {
    use_before_it_is_made: ["forward, relu", "stands after it", "made before it is used"],
    two_nodes_of_one_name: ["the root", "names are unique"],
    a_node_of_another_graph: ["threshold_backward", "not in this graph", "dangles"],
    an_attribute_that_is_gone: ["nowhere", "no attribute", "dangles"],
    an_unknown_template: ["no template Nobody", "names a known template"],
    a_part_that_no_template_has: ["has no sideways", "a part of its template"],
    too_few_operands: ["takes 7 operands for its forward, and here are 6"],
    an_operand_of_another_shape: ["operand 1", "float32[12, 6] where float32[6] is expected"],
    an_operand_of_another_dtype: ["where float64[6] is expected"],
    an_operand_of_another_layout: ["layout Shard(dim=0) where Full() is expected"],
    a_result_that_is_not_there: ["number 99 is taken"],
    a_call_used_as_a_whole: ["as a whole"],
    saved_values_of_another_layer: ["comes from", "what one forward of its template saved"],
    a_saved_argument_of_another_layer: ["took", "what one forward of its template saved"],
    a_saved_value_of_another_form: ["saved argument", "agree on what is saved"],
    a_forward_that_does_not_save: ["the edge of a graph is as described"],
    a_gradient_too_few: ["backward", "outputs", "the edge of a graph is as described"],
    a_gradient_of_another_shape: ["gradient", "belongs to an output, each gradient to an input"],
    a_gradient_of_nothing: ["gradient layers.9.norm.weight", "nothing of that name"],
    a_tangent_of_nothing: ["tangent 7", "nothing of that name"],
    a_forward_call_that_takes_a_gradient: ["it takes getitem", "does not rest on tangents"],
    a_result_that_the_backward_makes: ["joint, output 0", "the backward makes it"],
    a_tangent_of_another_shape: ["float32[2, 6] for float32[5, 6]", "shape and dtype of what"],
    a_tangent_too_many: ["1 tangents arrive, and 0 are described"],
    an_operator_in_place: ["relu", "aten.relu_.default writes into", "works in place"],
    a_node_without_a_value: ["relu", "no metadata value", "says what it makes"],
    outputs_in_another_order: ["output", "the edge of a graph is as described"],
    an_input_that_nobody_described: ["inputs", "described"],
    random_numbers_drawn_twice: ["native_dropout", "each random operator runs once"],
    a_template_under_another_name: ["known by its name"],
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_a_broken_rule_is_named(graph, breakage):
    breakage(graph)
    with pytest.raises(GraphError) as raised:
        verify(graph)
    assert all(word in str(raised.value) for word in BREAKAGES[breakage]), raised.value


def test_a_captured_step_keeps_every_rule(graph):
    verify(graph)
    verify_pass(graph, captured_step())


def test_a_graph_without_gradients_keeps_every_rule():
    torch.manual_seed(0)
    model = Tower().requires_grad_(False)
    graph = capture(model, torch.randn(5, WIDTH))
    assert all(template.backward is None for template in graph.templates.values())
    verify(graph)


class Turned(nn.Module):
    """Its result has other strides than the gradient that arrives for it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = x.t().contiguous().t() * 2
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_gradient_may_have_other_strides_than_its_result():
    torch.manual_seed(0)
    graph = capture(Turned(), torch.randn(5, WIDTH, requires_grad=True), loss=squared)
    verify(graph)
    verify_schedule(compile_graph(graph))


def squared(model, x):
    return model(x).square().mean()


def test_a_graph_captured_as_a_whole_keeps_every_rule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    graph = capture(model, torch.randn(5, 3), loss=squared)
    assert graph.templates == {}
    assert graph.values(Role.UPDATE)
    verify(graph)


@pytest.mark.parametrize("policy", list(Recompute), ids=lambda policy: policy.value)
def test_recomputation_draws_and_computes_by_the_rules(graph, policy):
    verify_pass(graph.copy(), recompute(graph, policy))


def test_a_pass_that_drops_a_random_operator_is_named(graph):
    after = graph.copy()
    for part in (block(after).joint, block(after).forward):
        drawn = find(part, ATEN.native_dropout.default)
        drawn.target, drawn.args = ATEN.max.dim, (drawn.args[0], 0)
    with pytest.raises(GraphError, match=r"native_dropout.*is gone.*neither drops"):
        verify_pass(graph, after)


def test_a_pass_that_repeats_a_random_operator_is_named(graph):
    after = captured_step(num_layers=5)
    with pytest.raises(GraphError, match=r"native_dropout.*is new"):
        verify_pass(graph, after)


@pytest.fixture
def two_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


class Reduced(nn.Module):
    """Two all-reduces of different kinds."""

    def forward(self, x):
        group = torch.distributed.group.WORLD
        x = collectives.all_reduce(x * 2, "sum", group)
        return collectives.all_reduce(x + 1, "max", group)


def reduced():
    graph = capture(Reduced(), torch.randn(4))
    (module,) = [t.forward for t in graph.templates.values()] or [graph.root]
    return graph, module


def test_a_collective_without_a_wait_is_named(two_ranks):
    graph, module = reduced()
    verify(graph)
    wait = find(module, torch.ops._c10d_functional.wait_tensor.default)
    wait.replace_all_uses_with(wait.args[0])
    with pytest.raises(GraphError, match=r"all_reduce.*each collective is waited for"):
        verify(graph)


def test_a_result_used_before_its_collective_is_waited_for_is_named(two_ranks):
    graph, module = reduced()
    wait = find(module, torch.ops._c10d_functional.wait_tensor.default)
    user = next(iter(wait.users))
    user.replace_input_with(wait, wait.args[0])
    with pytest.raises(GraphError, match=r"add.*does not wait for it"):
        verify(graph)


def test_a_pass_that_reorders_collectives_is_named(two_ranks):
    before, _ = reduced()
    after, module = reduced()
    first, second = module.graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.all_reduce.default
    )
    verify_pass(before, after)
    first.args, second.args = (
        (first.args[0], *second.args[1:]),
        (second.args[0], *first.args[1:]),
    )
    verify(after)
    with pytest.raises(GraphError, match="this collective has moved"):
        verify_pass(before, after)


def edit(schedule: Schedule, change):
    """Change the program of the block's forward."""
    name = next(name for name in schedule.templates if name.startswith("Block"))
    program = schedule.templates[name]
    schedule.templates[name] = change(program)


def change_step(position, **changes):
    def change(program: Program) -> Program:
        steps = list(program.steps)
        steps[position] = replace(steps[position], **changes)
        return replace(program, steps=tuple(steps))

    return change


def reversed_steps(program):
    return replace(program, steps=tuple(reversed(program.steps)))


def use_again(program):
    freed = next(name for step in program.steps for name in step.frees)
    *rest, last = program.steps
    return replace(program, steps=(*rest, replace(last, args=(Ref(freed),))))


SCHEDULE_BREAKAGES = {
    "steps in reverse": (reversed_steps, "made before it is used"),
    "a freed value used": (use_again, "a freed value is not used again"),
    "a free of nothing": (change_step(0, frees=("nothing",)), "a value is freed once"),
    "two steps of one name": (lambda p: change_step(1, name=p.steps[0].name)(p), "unique"),
    "no such operator": (change_step(0, target="aten.nothing.default"), "no operator"),
    "no such constant": (change_step(0, target="constant", args=("c",)), "no constant"),
    "no such object": (change_step(0, target="object:o"), "no object o"),
    "no such program": (change_step(0, target="call:Nobody.forward"), "no template program"),
    "a result that is not made": (lambda p: replace(p, results=(Ref("x"),)), "not made yet"),
    "another name": (lambda p: replace(p, name="x"), "known by its name"),
    "an operand more": (lambda p: replace(p, inputs=(*p.inputs, "x")), "takes 8"),
}


@pytest.mark.parametrize("name", SCHEDULE_BREAKAGES)
def test_a_broken_rule_of_a_schedule_is_named(graph, name):
    schedule = compile_graph(graph)
    verify_schedule(schedule)
    change, words = SCHEDULE_BREAKAGES[name]
    edit(schedule, change)
    with pytest.raises(GraphError, match=words):
        verify_schedule(schedule)


def test_a_schedule_without_its_backward_is_named(graph):
    schedule = compile_graph(graph)
    del schedule.programs["backward"]
    with pytest.raises(GraphError, match="no program 'backward'"):
        verify_schedule(schedule)


def test_each_value_is_freed_where_it_is_used_last():
    schedule = compile_graph(captured_step())
    num_freed = 0
    for program in (*schedule.programs.values(), *schedule.templates.values()):
        made = {step.name for step in program.steps}
        kept = set(refs_in(program.results))
        last = {}
        for step in program.steps:
            for name in (step.name, *refs_in((step.args, dict(step.kwargs)))):
                last[name] = step.name
        freed = {name: step.name for step in program.steps for name in step.frees}
        for name in made:
            assert freed.get(name) == (None if name in kept else last[name]), (program.name, name)
        num_freed += len(freed)
    assert num_freed

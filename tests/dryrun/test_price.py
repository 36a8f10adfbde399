"""The price of a schedule: closed forms of time, and what is said of bad input."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

import plait
from plait.cost.clusters import Cluster, Link, h100
from plait.cost.collectives import Collective, collective_s
from plait.cost.nccl_tests import Measured
from plait.cost.table import Source, Table
from plait.cost.timeline import Event, Stream, Timeline
from plait.cost.topology import message, place
from plait.dryrun.compare import compare
from plait.dryrun.learn import MeasuredSteps, launched_in_a_step, learn_table
from plait.dryrun.report import Titled, to_json, to_text
from plait.errors import GraphError, PlanError
from plait.executor.profile import profile_step
from plait.graph.storage import from_json
from plait.graph.storage import to_json as schedule_to_json


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self, width=32, num_layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def squares(model, x):
    return model(x).square().mean()


def schedule_of(model, x, plan=None, **settings):
    graph = plait.capture(model, x, loss=squares)
    return plait.compile(graph, plan, **settings)


def test_arithmetic_is_two_products_forward_and_four_backward_less_the_first():
    width, rows, layers = 32, 6, 3
    found = plait.price(
        schedule_of(Tower(width, layers), torch.zeros(rows, width)), plait.clusters.cpu()
    )
    product = 2 * rows * width * 2 * width
    assert found.flops == layers * 6 * product - product  # x needs no gradient
    assert found.recomputed_flops == 0
    assert found.mfu == pytest.approx(found.flops / found.step_s / 1e11)


def test_recompute_does_not_count_as_arithmetic_of_the_model():
    x, tower = torch.zeros(6, 32), Tower()
    plain = plait.price(schedule_of(tower, x), plait.clusters.cpu())
    plan = plait.ParallelPlan(recompute="full")
    again = plait.price(
        plait.compile(plait.capture(tower, x, plan, loss=squares), plan), plait.clusters.cpu()
    )
    assert again.flops == plain.flops
    assert again.recomputed_flops > 0
    assert again.saved_bytes < plain.saved_bytes


def test_a_stored_schedule_has_the_price_of_the_one_that_was_stored():
    schedule = schedule_of(Tower(), torch.zeros(6, 32))
    cluster = h100(1)
    stored = from_json(schedule_to_json(schedule))
    assert plait.price(stored, cluster).step_s == plait.price(schedule, cluster).step_s


def test_messages_take_the_time_of_their_link_and_the_timeline_shows_them():
    model, num_ranks = Tower(), 4
    link = Link(latency_s=1.0, bandwidth_bytes_per_s=1e12)
    device = plait.clusters.cpu().device
    cluster = Cluster(
        name="slow", device=device, num_ranks=4, ranks_per_node=4, inside=link, between=link
    )
    plan = plait.ParallelPlan(dp=num_ranks)
    found = plait.price(schedule_of(model, torch.zeros(6, 32), plan), cluster)
    assert found.communication_s == pytest.approx(1.0, rel=1e-3)
    assert found.exposed_s == pytest.approx(1.0, rel=1e-3)
    assert found.timeline.busy_s(Stream.COMMUNICATION) == found.communication_s
    assert found.step_s == pytest.approx(found.timeline.duration_s)
    assert found.low_s <= found.step_s <= found.high_s


def test_every_event_of_a_predicted_trace_says_where_its_time_comes_from():
    schedule = schedule_of(Tower(), torch.zeros(6, 32))
    found = plait.price(schedule, plait.clusters.cpu())
    events = found.timeline.to_chrome_trace()["traceEvents"]
    operators = [x for x in events if x.get("cat") == "operator"]
    origins = Counter(x["args"]["time from"] for x in operators if "time from" in x["args"])
    assert all("time from" in x["args"] for x in operators if x["dur"])
    assert origins == {
        source.value: share.num_operators
        for source, share in found.sources.items()
        if share.num_operators
    }


def two_nodes_of_two():
    near = Link(latency_s=1e-6, bandwidth_bytes_per_s=1e11)
    far = Link(latency_s=2e-5, bandwidth_bytes_per_s=1e9, step_latency_s=1e-5)
    device = h100(1).device
    return Cluster(
        name="nodes", device=device, num_ranks=4, ranks_per_node=2, inside=near, between=far
    )


def test_a_message_of_a_schedule_costs_what_one_of_a_large_job_does():
    cluster = two_nodes_of_two()
    schedule = schedule_of(Tower(), torch.zeros(6, 32), plait.ParallelPlan(dp=4))
    found = plait.price(schedule, cluster)
    axis = place(cluster, "dp", size=4)
    assert (axis.ranks_in_node, axis.num_nodes) == (2, 2)
    messages = [e for e in found.timeline.events if e.stream is Stream.COMMUNICATION]
    expected_s = [
        message(Collective.ALL_REDUCE, e.bytes_written, axis).duration_s for e in messages
    ]
    ring_s = [
        collective_s(Collective.ALL_REDUCE, e.bytes_written, 4, axis.between) for e in messages
    ]
    assert found.communication_s == pytest.approx(sum(expected_s))
    assert sum(expected_s) < 0.9 * sum(ring_s)  # another algorithm is faster between nodes


def test_a_message_that_nccl_tests_measured_takes_that_time_and_says_so():
    measured_s = 0.5
    schedule = schedule_of(Tower(), torch.zeros(6, 32), plait.ParallelPlan(dp=4))
    run = Measured(
        collective=Collective.ALL_REDUCE,
        num_ranks=4,
        ranks_per_node=2,
        num_bytes=(1, 10**9),
        durations_s=(measured_s, measured_s),
    )
    found = plait.price(schedule, two_nodes_of_two(), measured=[run])
    share = found.sources[Source.MEASURED]
    assert share.num_operators > 0
    assert found.communication_s == share.seconds == share.num_operators * measured_s
    assert found.high_s - found.step_s < 0.3 * found.step_s  # less than of a model
    assert found.warnings == ()
    elsewhere = replace(run, ranks_per_node=4)
    other = plait.price(schedule, two_nodes_of_two(), measured=[elsewhere])
    assert other.step_s == plait.price(schedule, two_nodes_of_two()).step_s
    assert other.sources[Source.MEASURED].num_operators == 0
    assert re.search(r"all_reduce of 4 ranks, 4 in a node.*4 ranks, 2 in a node", other.warnings[0])


def test_a_rank_of_fsdp_holds_its_part_of_parameters_and_state():
    model, x = Tower(64, 4), torch.zeros(8, 64)

    def optimizer():
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    whole, parted = (
        plait.price_step(
            model,
            [x],
            plait.ParallelPlan(fsdp=n),
            h100(4),
            loss=squares,
            optimizer=optimizer(),
            fragments=False,
        )
        for n in (1, 4)
    )
    for kind in ("parameters", "optimizer state"):
        ours, theirs = (
            sum(s.num_bytes for s in each.trace.storages if s.kind == kind)
            for each in (parted, whole)
        )
        assert ours == theirs / 4
    assert set(parted.programs_s) == {
        *("unshard", "forward", "backward", "reduce_gradients", "optimizer")
    }


def test_a_model_that_no_machine_here_could_hold_is_priced():
    with torch.device("meta"):
        model, x = Tower(2**16, 4), torch.empty(4, 2**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = plait.price_step(
        model, [x], plait.ParallelPlan(), h100(1), loss=squares, optimizer=optimizer
    )
    assert found.memory.peak_bytes > 2 * 2**37
    assert found.memory.reserved is not None
    assert found.memory.reserved.peak_bytes >= found.memory.peak_bytes


@torch.library.custom_op("dryrun_test::squashed", mutates_args=())
def squashed(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


@squashed.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_without_a_cost_is_named_and_never_free():
    with torch.no_grad():
        graph = plait.capture(nn.Sequential(nn.Linear(8, 8)), torch.zeros(4, 8))
        bare = plait.price(plait.compile(graph), plait.clusters.cpu())
        graph = plait.capture(Squashing(), torch.zeros(4, 8))
    found = plait.price(plait.compile(graph), plait.clusters.cpu())
    assert bare.warnings == ()
    assert "dryrun_test.squashed" in found.warnings[0]
    (event,) = [e for e in found.timeline.events if "squashed" in e.operator]
    assert event.duration_s > 0


class Squashing(nn.Module):
    def forward(self, x):
        return squashed(x)


def test_a_registered_formula_prices_an_operator_and_ends_the_warning():
    flops = 10**9
    with torch.no_grad():
        graph = plait.capture(Squashing(), torch.zeros(4, 8))
    schedule = plait.compile(graph)
    try:
        register_flop_formula(torch.ops.dryrun_test.squashed)(lambda *shapes, **_: flops)
        found = plait.price(schedule, plait.clusters.cpu())
    finally:
        flop_registry.pop(torch.ops.dryrun_test.squashed, None)
    assert found.warnings == ()
    assert found.flops == flops


def test_a_cluster_with_too_few_ranks_is_refused():
    schedule = schedule_of(Tower(), torch.zeros(6, 32), plait.ParallelPlan(dp=4))
    with pytest.raises(PlanError, match=r"over 4 ranks \(dp=4\), and the cluster h100 has 2"):
        plait.price(schedule, h100(2))
    with pytest.raises(PlanError, match="2 are missing"):
        plait.price_step(
            Tower(), [torch.zeros(6, 32)], plait.ParallelPlan(dp=4), h100(2), loss=squares
        )


def test_steps_are_counted_from_one_and_a_numbered_optimizer_is_explained():
    model, x = Tower(), torch.zeros(6, 32)
    schedule = schedule_of(model, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PlanError, match="counted from 1"):
        plait.price(schedule, h100(1), steps=0)
    with pytest.raises(GraphError, match="named_parameters"):
        plait.price(schedule, h100(1))


def test_measured_operators_price_the_step_that_they_came_from():
    model, x = Tower(), torch.randn(6, 32)
    schedule = schedule_of(model, x)
    plait.run(schedule, model, x)
    # A clock of one millisecond an operator: what is compared does not depend on the machine.
    events = profile_step(schedule, model, x).timeline.events
    timelines = [Timeline(tuple(replace(event, duration_s=1e-3) for event in events))]
    steps_s = [1e-3 * len(events)]
    device = plait.clusters.cpu().device
    measured = MeasuredSteps(schedule=schedule, timelines=timelines, steps_s=steps_s)
    table = learn_table("here", device, [measured])
    assert Table.from_json(table.to_json()) == table
    found = plait.price(schedule, plait.clusters.cpu(), table=table)
    assert found.step_s == pytest.approx(steps_s[0], rel=0.05)  # and the tangent, not measured
    assert found.sources[Source.MEASURED].num_operators > 0
    other = plait.price(
        schedule_of(Tower(48), torch.randn(6, 48)), plait.clusters.cpu(), table=table
    )
    assert other.sources[Source.INTERPOLATED].num_operators > 0


def test_messages_are_taken_off_a_step_from_which_a_table_is_learnt():
    schedule = schedule_of(Tower(), torch.zeros(6, 32), plait.ParallelPlan(dp=2))
    one_s, message_s = 1e-3, 20e-3
    events, num_messages = [], 0
    for each in launched_in_a_step(schedule):
        is_wait = "wait_tensor" in each.step.target
        num_messages += is_wait
        events.append(
            Event(
                name=each.step.name,
                operator=each.step.target,
                program=each.program,
                start_s=0.0,
                duration_s=message_s if is_wait else one_s * (each.outcome.collective is None),
                calls=each.calls,
            )
        )
    assert num_messages
    step_s = sum(event.duration_s for event in events)
    measured = MeasuredSteps(
        schedule=schedule, timelines=[Timeline(tuple(events))], steps_s=[step_s]
    )
    table = learn_table("here", plait.clusters.cpu().device, [measured])
    assert table.launch_s == pytest.approx(0.0, abs=1e-6)
    assert not [name for name in table.views_s if "wait_tensor" in name]
    messages = [
        Measured(
            collective=kind,
            num_ranks=2,
            ranks_per_node=2,
            num_bytes=(8, 2**30),
            durations_s=(message_s, message_s),
        )
        for kind in Collective
    ]
    cluster = plait.clusters.cpu(2)
    found = plait.price(schedule, cluster, table=table, measured=messages)
    assert found.communication_s == pytest.approx(num_messages * message_s)
    assert found.compute_s == pytest.approx(step_s - num_messages * message_s)

    # Alone they take half: the rest is that ranks never arrive at once, and is learnt.
    alone = [replace(each, durations_s=(message_s / 2, message_s / 2)) for each in messages]
    learnt = learn_table(
        "here", plait.clusters.cpu().device, [measured], cluster=cluster, messages=alone
    )
    assert learnt.message_s > 0
    assert Table.from_json(learnt.to_json()) == learnt
    short = plait.price(schedule, cluster, table=table, measured=alone)
    found = plait.price(schedule, cluster, table=learnt, measured=alone)
    assert short.step_s == pytest.approx(step_s - num_messages * message_s / 2)
    assert found.step_s == pytest.approx(step_s, rel=0.02)
    assert found.low_s < short.step_s < found.step_s < found.high_s


def test_a_table_knows_how_long_operators_take_behind_the_first_micro_batch():
    plan = plait.ParallelPlan(num_micro_batches=4)
    model, x = Tower(), torch.randn(8, 32)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    schedule = schedule_of(model, x[:2], plan, optimizer=optimizer)
    plait.run(schedule, model, x, optimizer=optimizer)
    seen: set[tuple[object, ...]] = set()
    events = []
    for event in profile_step(schedule, model, x, optimizer=optimizer).timeline.events:
        place = event.program, *(call.step for call in event.calls), event.name
        events.append(replace(event, duration_s=1e-3 if place in seen else 2e-3))
        seen.add(place)
    step_s = sum(event.duration_s for event in events)
    measured = MeasuredSteps(
        schedule=schedule, timelines=[Timeline(tuple(events))], steps_s=[step_s]
    )
    table = learn_table("here", plait.clusters.cpu().device, [measured])
    assert set(table.repeated.values()) == {0.5}
    assert {"matrix", "memory"} <= set(table.repeated)
    assert Table.from_json(table.to_json()) == table
    found = plait.price(schedule, plait.clusters.cpu(), table=table)
    assert found.step_s == pytest.approx(step_s, rel=0.1)  # sums of gradients are not measured
    unaware = replace(table, repeated={})
    assert plait.price(schedule, plait.clusters.cpu(), table=unaware).step_s > 1.5 * step_s
    with pytest.raises(PlanError, match="not a table"):
        Table.from_json(table.to_json().replace('"repeated": {', '"repeated": {"other": 1.0,'))


def test_a_table_of_several_programs_knows_how_far_it_is_off_another():
    schedule = schedule_of(model := Tower(), x := torch.randn(6, 32))
    events = profile_step(schedule, model, x).timeline.events

    def measured(event_s):
        timelines = [Timeline(tuple(replace(event, duration_s=event_s) for event in events))]
        steps_s = [event_s * len(events)]
        return MeasuredSteps(schedule=schedule, timelines=timelines, steps_s=steps_s)

    def spread(*events_s):
        table = learn_table("here", plait.clusters.cpu().device, [measured(x) for x in events_s])
        assert Table.from_json(table.to_json()) == table
        found = plait.price(schedule, plait.clusters.cpu(), table=table)
        assert found.high_s - found.step_s >= found.step_s * math.expm1(table.program_spread)
        return table.program_spread

    one_s = 1e-3
    assert spread(one_s, 3 * one_s) == 0.0  # too few programs
    assert spread(*(4 * [one_s])) == pytest.approx(0.0, abs=0.05)  # and the tangent, not measured
    assert spread(one_s, 2 * one_s, 2 * one_s, one_s) > math.log(1.3)


def test_a_price_reads_as_text_and_compares_with_itself():
    found = plait.price(schedule_of(Tower(), torch.zeros(6, 32)), h100(1))
    titled = Titled(title="a tower", price=found, tokens=6)
    text = to_text(titled)
    for words in ("a tower", "step time", "with fragments", "fits", "roofline", "bound by"):
        assert words in text
    assert "a billion tokens" not in text
    figures = json.loads(to_json(titled))
    assert figures["step_s"] == found.step_s
    assert {each.error for each in compare(figures, figures)} == {0.0}
    with pytest.raises(PlanError, match="no figure in common"):
        compare(figures, {"other": 1})


def test_the_parts_of_a_step_add_up_and_the_largest_loss_binds_it():
    model, x = Tower(256), torch.zeros(64, 256)
    plan = plait.ParallelPlan(dp=4, num_micro_batches=4)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    schedule = schedule_of(model, x, plan, optimizer=optimizer)
    found = plait.price(schedule, two_nodes_of_two())
    assert sum(found.parts_s.values()) == pytest.approx(found.step_s)
    assert found.parts_s["optimizer"] == pytest.approx(found.programs_s["optimizer"], rel=0.01)
    losses = {name: s for name, s in found.parts_s.items() if name != "matrix products"}
    name = max(losses, key=lambda each: losses[each])
    assert found.binding == f"{name}: {losses[name] / found.step_s:.0%} of the step"
    near = two_nodes_of_two().inside
    slow = replace(near, latency_s=1.0)
    waiting = plait.price(schedule, replace(two_nodes_of_two(), inside=slow, between=slow))
    assert waiting.binding == "exposed messages: 100% of the step"


def test_products_alone_bind_a_step_that_does_nothing_else():
    with torch.no_grad():
        graph = plait.capture(nn.Linear(64, 64, bias=False), torch.zeros(8, 64))
    found = plait.price(plait.compile(graph), h100(1))
    assert found.binding == "matrix products: 100% of the step"


def test_memory_that_is_missing_binds_and_a_cpu_has_no_limit():
    schedule = schedule_of(Tower(), torch.zeros(6, 32))
    machine = h100(1)
    small = replace(machine, device=replace(machine.device, memory_bytes=2**20))
    found, tight = plait.price(schedule, machine), plait.price(schedule, small)
    assert found.fits
    assert not tight.fits
    assert tight.step_s == found.step_s
    assert re.match(
        r"memory: 0\.\d\d GiB are missing: 0\.\d\d GiB are needed \(device context 0\.55,.*param",
        tight.binding,
    )
    assert tight.binding in to_text(Titled(title="a tower", price=tight))
    ours = plait.price(schedule, plait.clusters.cpu())
    assert (ours.fits, ours.memory_limit_bytes) == (None, None)
    assert "of the device" not in to_text(Titled(title="a tower", price=ours))


def test_tokens_have_a_cost_where_a_rank_has_a_price():
    found = plait.price(schedule_of(Tower(), torch.zeros(6, 32)), h100(1))
    titled = Titled(title="t", price=found, tokens=6, num_ranks=2, dollars_per_rank_hour=3.0)
    expected = 1e9 / (6 / found.step_s) / 3600 * 2 * 3.0
    assert titled.dollars_per_billion_tokens == pytest.approx(expected)
    assert json.loads(to_json(titled))["dollars_per_billion_tokens"] == pytest.approx(expected)
    assert f"{expected:,.2f} for a billion tokens" in to_text(titled)
    free = Titled(title="t", price=found, tokens=6)
    assert "dollars_per_billion_tokens" not in json.loads(to_json(free))
    with pytest.raises(PlanError, match="the tokens of a step are not known"):
        Titled(title="t", price=found, dollars_per_rank_hour=3.0)


def test_a_table_of_another_device_is_refused():
    schedule = schedule_of(Tower(), torch.zeros(6, 32))
    table = Table("here", (), plait.clusters.cpu().device)
    with pytest.raises(PlanError, match="measured on cpu, and the cluster h100"):
        plait.price(schedule, h100(1), table=table)

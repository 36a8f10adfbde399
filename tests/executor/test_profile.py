import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import plait
from plait.cost.timeline import Stream
from plait.dryrun.compare import compare
from plait.dryrun.report import Titled, to_json
from plait.executor.outcome import outcome_of
from plait.executor.profile import profile, stream_of
from plait.executor.run import Runnable
from plait.graph.place import walk


def test_a_profiled_run_keeps_every_bit_and_the_random_state(blocks):
    torch.manual_seed(3)
    expected = outcome_of(Runnable(blocks.schedule), blocks.inputs).named()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = profile(blocks.schedule, *blocks.inputs).outcome.named()
    assert torch.equal(torch.get_rng_state(), after)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_every_operator_is_an_event_with_its_place_and_line(blocks):
    events = profile(blocks.schedule, *blocks.inputs, num_warm_ups=0).timeline.events
    operators = [place for place in walk(blocks.schedule) if place.is_operator]
    assert [(event.program, event.calls, event.name) for event in events] == [
        (place.program, place.calls, place.step.name) for place in operators
    ]
    # Sums of the gradients of a value that is used twice come from no line.
    without = {(event.program, event.operator) for event in events if not event.source}
    assert without <= {("backward", "aten.add.Tensor"), ("backward", "aten.add_.Tensor")}
    assert {call.layer for event in events for call in event.calls} >= {"blocks.1", "blocks.2"}


def test_a_profile_stands_beside_a_price(blocks):
    measured = json.loads(profile(blocks.schedule, *blocks.inputs).to_json(peak_bytes=10**6))
    titled = Titled(title="blocks", price=plait.price(blocks.schedule, plait.clusters.cpu()))
    found = compare(json.loads(to_json(titled)), measured)
    assert {each.group for each in found} == {"step", "operators_s", "streams_s", "memory"}
    (peak,) = (each for each in found if each.group == "memory")
    assert peak.measured == 10**6
    of_operators = [each for each in found if each.group == "operators_s"]
    assert all(each.measured > 0 for each in of_operators)
    timed = profile(blocks.schedule, *blocks.inputs).to_json(step_s=0.5)
    assert json.loads(timed)["step_s"] == 0.5


def test_events_follow_each_other(blocks):
    measured = profile(blocks.schedule, *blocks.inputs)
    events = measured.timeline.events
    assert all(event.duration_s > 0 for event in events)
    assert all(a.end_s <= b.start_s for a, b in pairwise(events))
    assert 0 < measured.overhead_s < measured.timeline.duration_s


def test_bytes_are_those_of_operands_and_results(blocks):
    events = profile(blocks.schedule, *blocks.inputs).timeline.events
    by_operator = {event.operator: event for event in events if event.program == "forward"}
    # up or down: bias, (4, 8) or (4, 16) activations and an 8 x 16 weight, in 4 bytes
    assert by_operator["aten.addmm.default"].bytes_read == 4 * (8 + 4 * 16 + 8 * 16)
    assert by_operator["aten.addmm.default"].bytes_written == 4 * 4 * 8
    assert by_operator["aten.t.default"].bytes_read == 0
    assert by_operator["aten.t.default"].bytes_written == 0


def test_a_warm_up_leaves_buffers_alone(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    captured = make(model, torch.randn(8, 4))
    profile(captured.schedule, *captured.inputs, num_warm_ups=3)
    assert int(model[1].num_batches_tracked) == 1


def test_collectives_stand_in_the_stream_of_communication():
    assert stream_of("_c10d_functional.all_gather_into_tensor.default") is Stream.COMMUNICATION
    assert stream_of("aten.mm.default") is Stream.COMPUTE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_clock_is_the_devices(make):
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048, device="cuda")
    captured = make(model, torch.randn(2048, 2048, device="cuda"))
    measured = profile(captured.schedule, *captured.inputs)
    products = [each for each in measured.timeline.events if "mm" in each.operator]
    assert all(0 < each.duration_s < 0.1 for each in products)
    assert all(each.start_s >= 0 for each in measured.timeline.events)

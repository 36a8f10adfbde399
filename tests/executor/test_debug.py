import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from plait.errors import GraphError
from plait.executor.debug import Breakpoint, Dump, Listing, check_is_known
from plait.executor.observe import Lookout
from plait.executor.outcome import outcome_of
from plait.executor.run import Runnable
from plait.graph.place import walk


def run(captured, watch):
    return outcome_of(
        Runnable(captured.schedule, Lookout(captured.schedule, [watch])), captured.inputs
    )


def line_of(captured, operator):
    places = [place for place in walk(captured.schedule) if place.step.target == operator]
    return places[0].step.source.partition(", in ")[0]


@pytest.mark.parametrize(
    ("where", "num_hits"),
    [
        pytest.param("relu", 3, id="a step, in every call"),
        pytest.param("forward/block_1_forward_1/relu", 1, id="a place"),
        pytest.param("Block_1.forward/relu", 2, id="a step of a template"),
        pytest.param("forward/*/addmm*", 6, id="a pattern"),
        pytest.param("backward/*", 0, id="a pattern of another direction"),
    ],
)
@torch.no_grad()
def test_a_breakpoint_stops_where_it_is_set(blocks, where, num_hits):
    hits = []
    point = Breakpoint(where, hits.append)
    run(blocks, point.watch)
    assert len(hits) == point.num_hits == num_hits


def test_a_source_line_stops_at_its_steps_forward_and_backward(blocks):
    hits = []
    line = line_of(blocks, "aten.relu.default")
    run(blocks, Breakpoint(line.rpartition("/")[2], hits.append).watch)
    operators = {sighting.place.step.target for sighting in hits}
    assert {"aten.relu.default", "aten.threshold_backward.default"} <= operators
    assert "aten.square.default" not in operators
    assert "aten.div.Tensor" not in operators


def test_a_breakpoint_sees_the_value_and_what_made_it(blocks):
    hits = []
    run(blocks, Breakpoint("relu", hits.append).watch)
    for sighting in hits:
        assert torch.equal(sighting.value, torch.relu(sighting.operands["addmm"]))
        assert "from " in str(sighting)


def test_a_dumped_step_can_be_run_again_by_itself(blocks, tmp_path):
    dump = Dump(tmp_path / "steps", ("relu", "*native_layer_norm"))
    run(blocks, dump.watch)
    assert len(dump.files) == 6
    assert sorted((tmp_path / "steps").iterdir()) == dump.files
    norm, relu, *_ = dump.files
    assert relu.name.startswith("00001-forward.")
    assert relu.name.endswith(".relu.safetensors")
    tensors = load_file(relu)
    assert torch.equal(tensors["result"], torch.relu(tensors["operand.addmm"]))
    assert {"result.0", "result.1", "result.2"} < load_file(norm).keys()
    with safe_open(relu, framework="pt") as file:
        assert file.metadata()["operator"] == "aten.relu.default"
        assert "torch.relu" in file.metadata()["source"]


def test_complex_tensors_are_dumped_as_pairs_of_numbers(make, tmp_path):
    class Turn(torch.nn.Module):
        def forward(self, x):
            return torch.exp(1j * x)

    captured = make(Turn(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    dump = Dump(tmp_path, ("exp",))
    run(captured, dump.watch)
    (path,) = dump.files
    expected = torch.exp(1j * captured.inputs[0])
    assert torch.equal(torch.view_as_complex(load_file(path)["result"]), expected)


def test_a_listing_has_every_operator_of_the_first_run(blocks):
    lines = []
    listing = Listing(lines.append)
    runnable = Runnable(blocks.schedule, Lookout(blocks.schedule, [listing.watch]))
    for _ in range(2):
        outcome_of(runnable, blocks.inputs)
    operators = [place for place in walk(blocks.schedule) if place.is_operator]
    assert sum(" = " in line for line in lines if line.startswith("  ") and line[2] != " ") == len(
        operators
    )
    assert "call 1 of 2 of Block_1.forward (blocks.1), in the program forward" in lines
    assert any("relu = aten.relu.default: f32[4, 16]  0 to" in line for line in lines)


def test_an_unknown_step_is_refused_with_what_might_be_meant(blocks):
    with pytest.raises(GraphError, match="Did you mean 'relu'"):
        check_is_known("rellu", [blocks.schedule])
    with pytest.raises(GraphError, match=r"Lines that steps come from: .*conftest.py:\d+"):
        check_is_known("model.py:3", [blocks.schedule])
    with pytest.raises(GraphError, match=r"Use plait\.jit"):
        check_is_known("relu", [])
    check_is_known("forward/*/relu", [blocks.schedule])

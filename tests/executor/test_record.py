import pytest
import torch

from plait.executor.record import Recording, compare, record


@pytest.fixture
def recorded(blocks):
    def run(pattern="*"):
        torch.manual_seed(2)
        return record(blocks.schedule, *blocks.inputs, pattern=pattern)

    return run


def test_two_runs_from_the_same_random_state_are_equal(recorded):
    comparison = compare(recorded(), recorded())
    assert comparison.num_equal > 60
    assert comparison.differences == ()
    assert (comparison.only_first, comparison.only_second) == ((), ())
    assert str(comparison).endswith("0 something else")


def test_the_first_difference_is_the_step_that_takes_what_was_changed(blocks, recorded):
    before = recorded()
    with torch.no_grad():
        blocks.model.blocks[2].down.weight[3, 5] += 0.25
    first, *rest = compare(before, recorded()).differences
    assert first.first.step == "forward/block_1_forward_1/t_1"
    assert "self.down(self.dropout(share))" in first.first.source
    assert first.largest == pytest.approx(0.25)
    assert not any(each.first.step.startswith("forward/block_1_forward/") for each in rest)
    text = str(compare(before, recorded()))
    assert "call 2 of 2 of Block_1.forward (blocks.2), in the program forward, run 1" in text
    assert "largest difference 0.25" in text


def test_small_differences_are_allowed_where_a_tolerance_is_given(blocks, recorded):
    before = recorded()
    with torch.no_grad():
        blocks.model.blocks[0].up.weight *= 1 + 1e-6
    assert compare(before, recorded()).differences != ()
    assert compare(before, recorded(), rtol=1e-3, atol=1e-5).differences == ()


def test_a_recording_is_read_back_as_it_was(recorded, tmp_path):
    recording = recorded()
    recording.save(tmp_path / "run.safetensors")
    again = Recording.load(tmp_path / "run.safetensors")
    assert [vars(each) | {"tensors": ()} for each in again.records] == [
        vars(each) | {"tensors": ()} for each in recording.records
    ]
    assert compare(recording, again).differences == ()


def test_a_pattern_records_less_and_the_rest_is_said_to_be_missing(recorded):
    comparison = compare(recorded(), recorded("*relu"))
    assert comparison.num_equal == 3
    assert len(comparison.only_first) > 60
    assert "steps are only in the first run" in str(comparison)


def test_nan_is_equal_to_itself(blocks, recorded):
    with torch.no_grad():
        blocks.model.blocks[1].up.bias.fill_(-100)
    assert compare(recorded(), recorded()).differences == ()

import pytest
import torch

import plait
from plait.executor.observe import Lookout, observing, writes_in_place
from plait.executor.outcome import outcome_of
from plait.executor.run import Runnable
from plait.graph.place import walk
from plait.graph.schedule import resolve


def watched(captured, *watches):
    return Runnable(captured.schedule, Lookout(captured.schedule, list(watches)))


def run(runnable, captured):
    torch.manual_seed(1)
    return outcome_of(runnable, captured.inputs)


def test_every_place_of_the_schedule_is_seen_once_in_a_run(blocks):
    seen = []
    run(watched(blocks, lambda sighting: seen.append(sighting.place.name)), blocks)
    known = [place.name for place in walk(blocks.schedule)]
    assert len(set(known)) == len(known)
    assert sorted(seen) == sorted(known)


def test_operators_are_seen_in_their_order(blocks):
    seen = []
    run(watched(blocks, lambda sighting: seen.append(sighting.place)), blocks)
    operators = [place for place in walk(blocks.schedule) if place.is_operator]
    assert [place for place in seen if place.is_operator] == operators


def test_an_observed_run_keeps_every_bit(blocks):
    expected = run(Runnable(blocks.schedule), blocks).named()
    found = run(watched(blocks, lambda sighting: None), blocks).named()
    assert len(found) == 19  # the loss, and six parameters of each block
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_operands_are_what_the_operator_took(blocks):
    checked = []

    def repeat(sighting):
        step = sighting.place.step
        if step.target == "aten.addmm.default":
            made = resolve(step.target)(*(sighting.operands[ref.name] for ref in step.args))
            checked.append(torch.equal(made, sighting.value))

    run(watched(blocks, repeat), blocks)
    assert checked == [True] * 6


def test_operands_that_a_step_overwrites_are_shown_as_they_were(blocks):
    checked = []

    def repeat(sighting):
        if writes_in_place(sighting.place.step.target):
            made = resolve(sighting.place.step.target)(*sighting.operands.values())
            checked.append(torch.equal(made, sighting.value))

    run(watched(blocks, repeat), blocks)
    steps = [place.step.target for place in walk(blocks.schedule)]
    assert checked == [True] * sum(map(writes_in_place, steps))


def test_runs_of_a_program_are_numbered(blocks):
    runs = []
    runnable = watched(blocks, lambda sighting: runs.append(sighting.run))
    for _ in range(3):
        run(runnable, blocks)
    assert set(runs) == {1, 2, 3}


@torch.library.custom_op("plait_tests::picky", mutates_args=())
def picky(x: torch.Tensor) -> torch.Tensor:
    if bool((x > 10).any()):
        raise RuntimeError("too large a number")
    return x.clone()


picky.register_fake(torch.empty_like)


class Picky(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = torch.relu(picky(x))
        return x


@torch.no_grad()
def test_a_run_that_raised_does_not_confuse_the_next(make):
    torch.manual_seed(0)
    captured = make(Picky(), torch.randn(2, 4))
    seen = []
    runnable = watched(captured, lambda sighting: seen.append((sighting.run, sighting.place.name)))
    captured.model.layers[1].bias += 100
    with pytest.raises(RuntimeError, match="too large"):
        runnable(*captured.inputs)
    assert len(seen) < len(list(walk(captured.schedule)))
    seen.clear()
    captured.model.layers[1].bias -= 100
    runnable(*captured.inputs)
    assert sorted(seen) == sorted((2, place.name) for place in walk(captured.schedule))


@torch.no_grad()
def test_an_exception_of_a_kernel_names_the_step_and_the_users_line(make):
    torch.manual_seed(0)
    captured = make(Picky(), torch.randn(2, 4))
    captured.model.layers[1].bias += 100
    with pytest.raises(RuntimeError, match="too large") as raised:
        Runnable(captured.schedule)(*captured.inputs)
    notes = "\n".join(raised.value.__notes__)
    assert "plait_tests.picky.default" in notes
    assert f"{__file__}:" in notes
    assert "x = torch.relu(picky(x))" in notes


def test_whatever_is_compiled_in_the_context_is_observed():
    seen = []

    def function(x):
        return (x * 2).sin()

    compiled = plait.jit(function, cache=False)
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))

    def note(sighting):
        if sighting.place.is_operator:
            seen.append(sighting.place.step.target)

    with observing(lambda schedule: Lookout(schedule, [note])):
        found = compiled(x)
    assert seen == ["aten.mul.Tensor", "aten.sin.default"]
    assert torch.equal(found, function(x))
    plait.jit(function, cache=False)(x)
    assert len(seen) == 2

import torch
from torch import nn

import plait
from plait.graph.place import walk


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = torch.sin(x)
        for block in self.blocks:
            x = block(x)
        return x.sum()


def places():
    return list(walk(plait.compile(plait.capture(Model(), torch.zeros(2, 4)))))


def test_every_place_has_its_own_name():
    names = [place.name for place in places()]
    assert len(set(names)) == len(names)


def test_a_call_comes_before_its_steps_and_knows_its_layer():
    seen = {"forward", "backward"}
    for place in places():
        assert place.name.rpartition("/")[0] in seen
        seen.add(place.name)
    products = [place for place in places() if place.step.target == "aten.addmm.default"]
    layers = [place.calls[0].layer for place in products]
    assert layers == [f"blocks.{i}.linear" for i in range(4)]


def test_a_place_says_in_words_where_it_is():
    place = next(each for each in places() if each.calls and each.calls[0].number == 2)
    assert place.where.startswith("call 2 of ")
    assert place.where.endswith(", in the program forward")


def test_backward_operators_come_from_the_line_of_their_forward_operator():
    lines = {
        place.step.target: place.step.source
        for place in places()
        if place.program == "backward" and place.is_operator
    }
    assert "return torch.relu(self.linear(x))" in lines["aten.threshold_backward.default"]
    assert "return torch.relu(self.linear(x))" in lines["aten.mm.default"]

"""The paper machine against figures that were found another way."""

from dataclasses import dataclass, replace

import pytest

from benchmarks.overlap_layers import LLAMA_70B, PaperTimes, Shape, Split, backward, forward
from benchmarks.overlap_price import equal_parts, price, search
from plait.cost.clusters import Link, h200
from plait.cost.simulate import COMPUTE, FILLER, list_schedule


@dataclass(frozen=True)
class ConstantTimes:
    """Closed forms for Llama 70B: products at 65 % of 989 TFLOP/s whatever their rows."""

    bandwidth: float = 350e9
    latency_s: float = 15e-6

    def product_s(self, rows, inner, columns):
        return 2 * rows * inner * columns / (989e12 * 0.65)

    def attention_s(self, pairs):
        return 4 * pairs * 8192 / 8 / (989e12 * 0.5)

    def moved_s(self, num_elements):
        return 2 * num_elements / 3.0e12

    def message_s(self, num_elements):
        return self.latency_s + 2 * num_elements * 7 / 8 / self.bandwidth


SIXTEEN_LAYERS = replace(LLAMA_70B, num_layers=16)

# What another simulator (one heap of events, one greedy list for each resource) printed for these
# inputs: share of its own communication that each split hides. Keys: GB/s, replicas, causal split.
PUBLISHED_FORWARD = {
    (350, 1, False): 0.000,
    (350, 2, False): 0.455,
    (350, 3, False): 0.581,
    (350, 4, False): 0.638,
    (350, 2, True): 0.486,
    (350, 4, True): 0.721,
    (200, 2, False): 0.371,
    (200, 3, False): 0.482,
    (200, 4, False): 0.535,
    (200, 2, True): 0.514,
    (200, 4, True): 0.680,
    (100, 2, False): 0.312,
    (100, 4, True): 0.535,
    (45, 2, False): 0.247,
    (45, 4, False): 0.255,
}
PUBLISHED_BACKWARD = {
    (350, 1): 0.750,
    (350, 2): 0.992,
    (200, 1): 0.700,
    (200, 2): 0.900,
    (100, 1): 0.351,
    (100, 2): 0.766,
    (45, 1): 0.265,
    (45, 2): 0.517,
}
STAGES = {
    "forward": {
        "qkv": 0,
        "attend": 1,
        "o": 2,
        "scatter": 2,
        "norm": 2.5,
        "gather": 3,
        "gate_up": 4,
        "down": 4,
        "scatter_2": 5,
        "norm_2": 4.05,
        "in": 6,
    },
    "backward": {
        "gather_2": 0,
        "down": 1,
        "gate_up": 1,
        "scatter": 2,
        "norm": 1.5,
        "gather": 3,
        "o": 4,
        "attend": 5,
        "qkv": 6,
        "scatter_2": 7,
        "in": 6.5,
    },
}
SECOND = {"forward": "down", "backward": "gate_up"}  # right after the first of the same replica


def published_priority(direction, name):
    """Layer, stage, replica: what the other simulator ordered by."""
    kind, layer, *replica = name.split(".")
    if kind == "weight":
        return FILLER
    at = int(layer) - (kind == "in")
    return (at, STAGES[direction][kind], int(*replica or [0]) + 0.1 * (kind == SECOND[direction]))


def hidden(program, priority):
    done = list_schedule(program.operations, priority)
    return 1 - (done.total_s - done.compute_s) / done.communication_s


def parts(num_replicas, *, is_causal=False):
    return Split((8192 / num_replicas,) * num_replicas, (), is_causal)


@pytest.mark.parametrize(("case", "published"), PUBLISHED_FORWARD.items(), ids=str)
def test_forward_agrees_with_published_figures(case, published):
    bandwidth, num_replicas, is_causal = case
    split = parts(num_replicas, is_causal=is_causal)
    program = forward(SIXTEEN_LAYERS, ConstantTimes(bandwidth * 1e9), split)
    priority = [published_priority("forward", each.name) for each in program.operations]
    assert hidden(program, priority) == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(("case", "published"), PUBLISHED_BACKWARD.items(), ids=str)
def test_backward_agrees_with_published_figures(case, published):
    bandwidth, num_replicas = case
    program = backward(SIXTEEN_LAYERS, ConstantTimes(bandwidth * 1e9), parts(num_replicas))
    # There the gradients of gate and up were one product, and those of q, k and v.
    seconds = {each.name: each.duration_s for each in program.operations}
    for i, each in enumerate(program.operations):
        joined = each.duration_s
        for first, second in (("weight.gate.", "weight.up."), ("weight.q.", "weight.kv.")):
            if each.name.startswith(first):
                joined += seconds[each.name.replace(first, second)]
            elif each.name.startswith(second):
                joined = 0.0
        program.operations[i] = replace(each, duration_s=joined)
    priority = [published_priority("backward", each.name) for each in program.operations]
    assert hidden(program, priority) == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(("num_replicas", "published"), [(2, 0.56), (4, 0.87)], ids=["two", "four"])
def test_skew_wins_what_was_published(num_replicas, published):
    program = forward(SIXTEEN_LAYERS, ConstantTimes(), parts(num_replicas))
    best = max(hidden(program, program.priorities(skew)) for skew in range(9))
    assert best >= published - 0.02


LINK = Link(latency_s=5e-6, bandwidth_bytes_per_s=350e9)
SMALL = Shape(name="small", width=8192, inner_width=28672, key_width=1024, num_layers=4)
TIMES = PaperTimes(SMALL, h200(8).device, LINK)


@pytest.mark.parametrize("build", [forward, backward])
@pytest.mark.parametrize("joined", [(), (1, 3), (2, 2)], ids=str)
def test_splitting_neither_loses_nor_invents_work(build, joined):
    split = Split((2048,) * 4, joined)
    program = build(SMALL, ConstantTimes(latency_s=0.0), split)
    weights = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    passes = 1 if build is forward else 2
    products_s = passes * 2 * 8192 * 4 * weights / 8 / (0.65 * 989e12)
    attention_s = (1 if build is forward else 2.5) * 4 * 4 * (8192**2 / 2) * 1024 / (989e12 * 0.5)
    norms_s = passes * 4 * 2 * 6 * 2 * 8192 * 1024 / 3e12
    gates_s = 4 * 3 * 2 * 8192 * 3584 / 3e12
    computed_s = sum(each.duration_s for each in program.operations if each.stream == COMPUTE)
    assert computed_s == pytest.approx(products_s + attention_s + norms_s + gates_s)
    messages_s = sum(each.duration_s for each in program.operations if each.stream != COMPUTE)
    assert messages_s == pytest.approx(4 * 4 * 2 * 8192 * 8192 * 7 / 8 / 350e9)


def test_a_causal_split_computes_the_same_pairs():
    sizes = (2048, 1024, 3072, 2048)
    split = Split(sizes, (), is_causal=True)
    assert sum(split.pairs(j) for j in range(4)) == 8192**2 / 2


def test_an_unsplit_forward_hides_nothing_and_pays_nothing():
    priced = price(forward, SMALL, TIMES, Split((8192,)))
    assert priced.net_hidden == pytest.approx(0, abs=1e-4)
    assert priced.split_penalty == pytest.approx(0, abs=1e-4)
    message_s = 5e-6 + 7 / 8 * 2 * 8192 * 8192 / 350e9
    assert priced.unsplit_s - priced.free_s == pytest.approx(4 * 4 * message_s)
    assert priced.communication_to_compute == pytest.approx(4 * 4 * message_s / priced.free_s)


@pytest.mark.parametrize("build", [forward, backward])
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_a_split_cannot_win_back_what_it_costs(build, num_replicas):
    priced = price(build, SMALL, TIMES, Split(equal_parts(8192, num_replicas)))
    assert 0 < priced.net_hidden <= 1 - priced.split_penalty + 1e-4
    assert priced.split_penalty > 0.02


def test_joining_the_products_of_the_mlp_costs_less():
    penalties = [
        price(forward, SMALL, TIMES, Split((2048,) * 4, joined)).split_penalty
        for joined in ((), (1, 2, 1), (2, 2), (4,))
    ]
    assert penalties == sorted(penalties, reverse=True)


def test_interference_costs():
    split = Split((2048,) * 4)
    ideal, slowed = (price(forward, SMALL, TIMES, split, slowdown=x) for x in (1.0, 1.19))
    assert ideal.free_s == slowed.free_s  # nothing overlaps there
    assert slowed.net_hidden < ideal.net_hidden - 0.05


def test_the_search_is_never_worse_than_equal_parts():
    found = search(forward, SMALL, TIMES, is_causal=False, max_replicas=3)
    equal = [price(forward, SMALL, TIMES, Split(equal_parts(8192, n))) for n in (1, 2, 3)]
    assert found.ordered_s <= min(each.ordered_s for each in equal)
    assert sum(found.split.sizes) == 8192


def test_equal_parts_are_multiples_of_the_grain():
    assert equal_parts(8192, 3) == (2816, 2816, 2560)
    assert equal_parts(8192, 4) == (2048,) * 4


def test_weight_gradients_keep_to_the_limit_of_what_they_pin():
    program = backward(SMALL, TIMES, Split((4096,) * 2))
    limit = 600 << 20
    priority = program.priorities(0.0)
    bounded = list_schedule(program.operations, priority, pinned_limit_bytes=limit)
    assert pinned_beside_others(bounded) <= limit
    assert pinned_beside_others(list_schedule(program.operations, priority)) > limit


def pinned_beside_others(done):
    """The most that weight gradients keep waiting while something else begins to compute."""
    most = 0
    for i, each in enumerate(done.operations):
        if each.stream == COMPUTE and not each.pinned_bytes:
            waiting = [
                other.pinned_bytes
                for k, other in enumerate(done.operations)
                if other.pinned_bytes
                and max(done.end_s[need] for need in other.depends_on) <= done.start_s[i]
                and done.start_s[k] > done.start_s[i]
            ]
            most = max(most, sum(waiting))
    return most

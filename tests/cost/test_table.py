"""Measured times: found again, interpolated inside a family, and left to the roofline elsewhere."""

import json

import pytest
import torch

from plait.cost.clusters import cpu
from plait.cost.interpolate import variant_of
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.table import Source, Table
from plait.cost.table_entry import Entry
from plait.errors import PlanError

DEVICE = cpu().device


def product(rows, slow_down=2.0):
    sizes = (rows, 512, 512)
    cost = Cost(kind=Kind.MATRIX, bytes=rows * 4096, flops=2 * rows * 512 * 512, sizes=sizes)
    seconds = slow_down * operation_s(cost, DEVICE)
    entry = Entry(
        key=f"mm {rows}",
        operator="aten.mm.default",
        seconds=seconds,
        low_s=seconds,
        high_s=seconds,
        flops=cost.flops,
        bytes=cost.bytes,
        dtype="torch.float32",
        sizes=sizes,
    )
    return cost, entry


def table_of(*rows):
    return Table("here", tuple(product(each)[1] for each in rows), DEVICE)


def test_what_was_measured_is_found_again_with_its_spread():
    cost, entry = product(64)
    found = table_of(64, 256).duration("aten.mm.default", "mm 64", cost)
    assert found.source is Source.MEASURED
    assert found.seconds == entry.seconds
    assert found.low_s == pytest.approx(0.97 * found.seconds)
    assert found.high_s == pytest.approx(1.03 * found.seconds)


def test_between_its_entries_a_family_keeps_its_ratio_to_the_roofline():
    cost, entry = product(128)
    found = table_of(64, 256).duration("aten.mm.default", "mm 128", cost)
    assert found.source is Source.INTERPOLATED
    assert found.seconds == pytest.approx(entry.seconds)
    assert found.low_s < entry.seconds < found.high_s


def test_far_from_its_family_and_without_one_the_roofline_speaks():
    cost, _ = product(64 * 64)
    table = table_of(64)
    for operator in ("aten.mm.default", "aten.bmm.default"):
        found = table.duration(operator, "new", cost)
        assert found.source is Source.ROOFLINE
        assert found.seconds == operation_s(cost, DEVICE)


def test_a_table_is_written_and_read_and_anything_else_is_refused():
    table = table_of(64, 256)
    assert Table.from_json(table.to_json()) == table
    with pytest.raises(PlanError, match="not a table of `plait calibrate`"):
        Table.from_json("[1, 2")
    with pytest.raises(PlanError, match="not a table"):
        Table.from_json('{"format": 5}')
    with pytest.raises(PlanError, match="format 7, this Plait reads 5"):
        Table.from_json('{"format": 7}')
    assert table.device.peak_flops_per_s[torch.float32] == DEVICE.peak_flops_per_s[torch.float32]


def in_pieces(operator, pieces, flops, piece_s, flops_per_s, dtype=torch.float32):
    """A kernel that does what it does in pieces, each of which takes its time beside arithmetic."""
    cost = Cost(kind=Kind.ATTENTION, bytes=flops // 8, flops=flops, dtype=dtype, pieces=pieces)
    seconds = piece_s * pieces + flops / flops_per_s
    entry = Entry(
        key=f"{operator}({flops}, {pieces})",
        operator=operator,
        seconds=seconds,
        low_s=seconds,
        high_s=seconds,
        flops=flops,
        bytes=cost.bytes,
        dtype=str(dtype),
        pieces=pieces,
    )
    return cost, entry


def test_what_pieces_cost_is_told_from_arithmetic_and_carried_to_other_sizes():
    # 100 us a piece, as of bfloat16's attention backward on a CPU: of small pieces most of the time
    machine = {"piece_s": 1e-4, "flops_per_s": 5e10}
    sizes = [(64, 2**25), (96, 2**25 + 2**24), (64, 2**27), (128, 2**26)]
    entries = tuple(in_pieces("f.default", *each, **machine)[1] for each in sizes)
    cost, truth = in_pieces("f.default", 256, 2**30, **machine)
    found = Table("here", entries, DEVICE).duration("f.default", truth.key, cost)
    assert found.source is Source.INTERPOLATED
    assert found.seconds == pytest.approx(truth.seconds, rel=0.05)


def test_where_all_pieces_are_alike_the_roofline_counts_once_and_pieces_cost_the_rest():
    cost, entry = in_pieces("f.default", 64, 2**24, piece_s=1e-4, flops_per_s=1e11)
    table = Table("here", (entry,), DEVICE)
    more = Cost(kind=Kind.ATTENTION, bytes=cost.bytes, flops=4 * cost.flops, pieces=64)
    expected_s = entry.seconds + operation_s(more, DEVICE) - operation_s(cost, DEVICE)
    assert table.duration("f.default", "f.default(new)", more).seconds == pytest.approx(expected_s)


def test_an_operator_that_is_known_in_another_dtype_is_as_far_from_its_roofline():
    rows = [64, 128, 256]
    entries = tuple(product(each)[1] for each in rows)
    sizes = (128, 512, 512)
    cost = Cost(
        kind=Kind.MATRIX, bytes=2**18, flops=2 * 128 * 512**2, dtype=torch.bfloat16, sizes=sizes
    )
    found = Table("here", entries, DEVICE).duration("aten.mm.default", "mm new", cost)
    assert found.source is Source.ROOFLINE  # not of its family
    assert found.seconds == pytest.approx(2 * operation_s(cost, DEVICE))
    assert found.high_s / found.seconds >= 1.5


def pointwise(operator, num_bytes, seconds, given="float32[1]"):
    cost = Cost(kind=Kind.MEMORY, bytes=num_bytes)
    entry = Entry(
        key=f"{operator}({given}, {num_bytes})",
        operator=operator,
        seconds=seconds,
        low_s=seconds,
        high_s=seconds,
        flops=0,
        bytes=num_bytes,
        dtype="torch.float32",
    )
    return cost, entry


def test_a_variant_is_a_key_without_its_sizes():
    assert variant_of("aten.add.Tensor(float32[8x1], 1.5e-05)") == "aten.add.Tensor(float32, x)"
    assert variant_of("f(float32[4x2]/1x4, [2, -1], True, scale=0.25)") == (
        "f(float32/, [n, n], True, scale=x)"
    )
    assert variant_of("f(float32[2], None)") != variant_of("f(float32[2], 30.0)")


def test_entries_with_the_same_constants_go_first():
    # A cap makes the kernel three times as slow; the capped one is nearer in size.
    rows = [(2**18, 1e-3, "None"), (2**20, 4e-3, "None"), (2**19, 6e-3, "30.0")]
    entries = tuple(pointwise("f.default", size, s, given)[1] for size, s, given in rows)
    table = Table("here", entries, DEVICE)
    plain = table.duration(
        "f.default", f"f.default(None, {2**19})", Cost(kind=Kind.MEMORY, bytes=2**19)
    )
    capped = table.duration(
        "f.default", f"f.default(7.5, {2**18})", Cost(kind=Kind.MEMORY, bytes=2**18)
    )
    assert plain.seconds == pytest.approx(2e-3)
    assert capped.seconds == pytest.approx(3e-3)


def test_the_interval_of_a_family_is_how_far_its_entries_are_off_each_other():
    def width(noise):
        rows = [(2**i, 1e-9 * 2**i * (1 + noise * (-1) ** i)) for i in range(14, 30)]
        entries = tuple(pointwise("f.default", size, seconds)[1] for size, seconds in rows)
        cost = Cost(kind=Kind.MEMORY, bytes=3 * 2**20)
        found = Table("here", entries, DEVICE).duration("f.default", "f.default(new)", cost)
        return found.high_s / found.seconds

    assert width(0.0) == pytest.approx(1.05, abs=0.01)  # the least
    assert width(0.3) > 1.3


def test_an_operator_without_a_family_is_as_slow_as_those_of_its_class():
    # By the class, not by the bytes alone: an exponential takes longer than a sum.
    entries = [pointwise("aten.mul.Tensor", 2**i, 1e-9 * 2**i)[1] for i in range(15, 25)]
    entries += [pointwise("aten.silu.default", 2**i, 5e-9 * 2**i)[1] for i in range(15, 25)]
    table = Table("here", tuple(entries), DEVICE)
    cost = Cost(kind=Kind.MEMORY, bytes=2**20)
    for operator, expected_s in (
        ("aten.gelu.default", 5e-9 * 2**20),
        ("aten.sub.Tensor", 1e-9 * 2**20),
    ):
        found = table.duration(operator, f"{operator}(new)", cost)
        assert found.source is Source.ROOFLINE
        assert found.seconds == pytest.approx(expected_s, rel=0.01)
        assert found.low_s < found.seconds < found.high_s


def test_a_table_with_impossible_times_is_refused():
    table = table_of(64)
    text = table.to_json()
    assert text.count('"seconds"') == 1
    broken = text.replace('"seconds": ', '"seconds": -')
    with pytest.raises(PlanError, match="must be positive and in this order"):
        Table.from_json(broken)


def changed(table, path, value):
    """The table's text with another value at a path of names and numbers."""
    data = json.loads(table.to_json())
    *ahead, last = path
    at = data
    for each in ahead:
        at = at[each]
    at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["launch_s"], float("nan"), "launch_s is nan"),
        (["launch_s"], "soon", "launch_s is 'soon'"),
        (["launch_s"], True, "launch_s is True"),
        (["launch_s"], -1.0, "launch_s is -1.0: it must be from -0.001 to 1 s"),
        (["launch_s"], 10**310, "launch_s is 1000"),
        (["device", "memory_bandwidth_bytes_per_s"], "fast", "bandwidth_bytes_per_s is 'fast'"),
        (["device", "memory_bandwidth_bytes_per_s"], 0, "bandwidth_bytes_per_s is 0"),
        (["device", "peak_flops_per_s"], {}, "must have torch.float32"),
        (["device", "peak_flops_per_s", "torch.float32"], -1, r"\['torch.float32'\] is -1"),
        (["device", "matrix_efficiency"], None, "device.matrix_efficiency is None"),
        (["device", "memory_bytes"], 1.5, "device.memory_bytes is 1.5"),
        (["program_spread"], float("inf"), "program_spread is inf: it is a logarithm"),
        (["program_spread"], 1e6, "program_spread is 1000000.0: it is a logarithm"),
        (["message_s"], -1e-6, "message_s is -1e-06"),
        (["message_s"], float("nan"), "message_s is nan"),
        (["step_low"], 0, "step_low is 0"),
        (["step_high"], -1.0, "step_high is -1.0"),
        (["step_high"], 0.5, "step_low is 1.0 and its step_high 0.5"),
        (["views_s"], {"aten.view.default": -1e-6}, r"views_s\['aten.view.default'\] is -1e-06"),
        (["repeated"], {"memory": 0}, r"repeated\['memory'\] is 0"),
        (["entries", 0, "pieces"], -1, "pieces of the entry 'mm 64' is -1: it must be a whole"),
        (["entries", 0, "pieces"], 1.5, "pieces of the entry 'mm 64' is 1.5"),
        (["entries", 0, "flops"], "many", "flops of the entry 'mm 64' is 'many'"),
        (["entries", 0, "sizes"], [1, 2], "sizes of the entry 'mm 64'"),
        (["entries", 0, "seconds"], "1", "seconds of the entry 'mm 64' is '1'"),
        (["entries", 0, "high_s"], float("inf"), "high_s of the entry 'mm 64' is inf"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_figure_that_no_measurement_makes_is_refused_by_its_name(path, value, message):
    with pytest.raises(PlanError, match=message):
        Table.from_json(changed(table_of(64), path, value))


def test_a_launch_may_be_a_little_negative_but_not_so_that_all_operators_are_free():
    _, entry = product(64, slow_down=0.5)
    table = Table("here", (entry,), DEVICE)
    assert Table.from_json(changed(table, ["launch_s"], -entry.seconds / 2)).launch_s < 0
    with pytest.raises(PlanError, match="makes every operator that was measured free"):
        Table.from_json(changed(table, ["launch_s"], -entry.seconds))


def test_a_file_that_is_no_table_is_named(tmp_path):
    path = tmp_path / "times.json"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(PlanError, match=r"times\.json is not text: give the JSON"):
        Table.load(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match=r"times\.json: this is not a table"):
        Table.load(path)

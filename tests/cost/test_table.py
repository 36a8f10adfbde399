"""Measured times: found again, interpolated inside a family, and left to the roofline elsewhere."""

import pytest
import torch

from plait.cost.clusters import cpu
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.table import Entry, Source, Table
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
        Table.from_json('{"format": 1}')
    with pytest.raises(PlanError, match="format 7, this Plait reads 1"):
        Table.from_json('{"format": 7}')
    assert table.device.peak_flops_per_s[torch.float32] == DEVICE.peak_flops_per_s[torch.float32]

import json

import pytest

from plait.cost.timeline import Event, Stream, Timeline
from plait.graph.place import Call

FIRST, SECOND = (
    Call(step=f"block_{i}", template="Block.forward", number=i, num_calls=2) for i in (1, 2)
)
INNER = Call(step="part", template="Part.forward", number=1, num_calls=1)


def event(start_ms, duration_ms, operator="aten.mm.default", calls=(), **more):
    return Event(
        name="mm",
        operator=operator,
        program="forward",
        start_s=start_ms / 1e3,
        duration_s=duration_ms / 1e3,
        calls=calls,
        **more,
    )


TIMELINE = Timeline(
    (
        event(0, 1, calls=(FIRST,), bytes_read=10, bytes_written=5),
        event(1, 2, calls=(FIRST, INNER), bytes_read=10, bytes_written=5),
        event(1.5, 4, "_c10d_functional.all_reduce.default", stream=Stream.COMMUNICATION),
        event(3, 1, "aten.add.Tensor", calls=(FIRST,), source="model.py:3"),
        event(4, 1, calls=(SECOND,)),
    )
)


def spans(trace, category):
    return [each for each in trace["traceEvents"] if each.get("cat") == category]


def test_it_lasts_until_its_last_event_ends():
    assert TIMELINE.duration_s == pytest.approx(5.5e-3)
    assert TIMELINE.busy_s(Stream.COMPUTE) == pytest.approx(5e-3)
    assert TIMELINE.busy_s(Stream.COMMUNICATION) == pytest.approx(4e-3)
    assert Timeline(()).duration_s == 0


def test_totals_add_up_by_operator_and_begin_with_the_longest():
    totals = TIMELINE.totals()
    assert [(each.operator, each.num_events) for each in totals] == [
        ("aten.mm.default", 3),
        ("_c10d_functional.all_reduce.default", 1),
        ("aten.add.Tensor", 1),
    ]
    assert totals[0].duration_s == pytest.approx(4e-3)
    assert (totals[0].bytes_read, totals[0].bytes_written) == (20, 10)
    assert sum(each.duration_s for each in totals) == pytest.approx(9e-3)


def test_the_trace_has_complete_events_in_microseconds():
    operators = spans(TIMELINE.to_chrome_trace(), "operator")
    assert len(operators) == 5
    assert all(each["ph"] == "X" for each in operators)
    assert [each["ts"] for each in operators] == [0, 1000, 1500, 3000, 4000]
    assert [each["dur"] for each in operators] == [1000, 2000, 4000, 1000, 1000]
    assert operators[1]["args"]["step"] == "forward/block_1/part/mm"
    assert operators[3]["args"]["source"] == "model.py:3"


def test_each_stream_has_a_named_row():
    events = TIMELINE.to_chrome_trace()["traceEvents"]
    rows = {each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M"}
    assert sorted(rows.values()) == ["communication", "compute"]
    (reduction,) = (each for each in events if "all_reduce" in each["name"])
    assert rows[reduction["tid"]] == "communication"


def test_a_call_spans_its_operators():
    calls = spans(TIMELINE.to_chrome_trace(), "call")
    assert [(each["name"], each["ts"], each["dur"]) for each in calls] == [
        ("call 1 of 2 of Block.forward", 0, 4000),
        ("call 1 of 1 of Part.forward", 1000, 2000),
        ("call 2 of 2 of Block.forward", 4000, 1000),
    ]


def test_a_saved_trace_is_read_back_as_json(tmp_path):
    TIMELINE.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == TIMELINE.to_chrome_trace()


def test_its_text_is_a_table_of_operators():
    first, titles, longest, *_ = str(TIMELINE).splitlines()
    assert first == "5 operators in 5.500 ms"
    assert titles.split() == ["ms", "share", "count", "MB", "operator"]
    assert longest.split() == ["4.000", "44.4%", "3", "0.00", "aten.mm.default"]

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from plait.cost.overlap import OverlapReport, OverlapTimes, exposed_intervals, exposed_s
from plait.cost.overlap_picture import page, picture
from plait.cost.simulate import COMPUTE, Operation, communication, list_schedule, simulate
from plait.cost.timeline import Event, Stream, Timeline
from plait.errors import GraphError

TP = communication("tp")
SVG = "{http://www.w3.org/2000/svg}"


def event(stream, start_s, end_s, name="mm"):
    return Event(
        name=name,
        operator=name,
        program="forward",
        start_s=start_s,
        duration_s=end_s - start_s,
        stream=stream,
    )


def timeline(computing, communicating):
    return Timeline(
        (
            *(event(Stream.COMPUTE, *each) for each in computing),
            *(event(Stream.COMMUNICATION, *each, "all_reduce") for each in communicating),
        )
    )


# 4 s of communication beside 10 s of compute; the split costs 1 s and 0.5 s of that is exposed.
TIMES = OverlapTimes(
    num_replicas=2,
    unsplit_s=14.0,
    split_s=15.0,
    overlapped_s=11.5,
    free_s=10.0,
    split_free_s=11.0,
    unsplit=timeline([(0, 5), (9, 14)], [(5, 9)]),
    overlapped=timeline([(0, 6), (6.5, 11.5)], [(2, 4), (5, 7)]),
)
REPORT = OverlapReport(
    model="Llama <small>",
    axis="tokens",
    times={"forward": TIMES, "backward": replace(TIMES, unsplit=None, overlapped=None)},
    notes=("tp: 8 ranks",),
)


def test_shares_are_those_of_their_definitions():
    assert TIMES.net_hidden == pytest.approx(2.5 / 4)
    assert TIMES.hidden == pytest.approx(3.5 / 4)
    assert TIMES.split_penalty == pytest.approx(1 / 4)
    assert TIMES.communication_to_compute == pytest.approx(4 / 10)
    assert TIMES.speedup == pytest.approx(14 / 11.5)
    assert TIMES.trace_exposed == pytest.approx(0.5 / 4)


def test_what_is_not_hidden_is_exposed_or_paid_for_the_split():
    # (T0 - To) / C = 1 - (To - Tn) / C - (Tn - Tn0) / C
    left = (TIMES.overlapped_s - TIMES.split_free_s) / TIMES.communication_s
    assert TIMES.net_hidden == pytest.approx(1 - left - TIMES.split_penalty)


def test_exposed_time_is_communication_without_compute():
    shown = timeline([(0, 2), (1, 3), (5, 6), (6, 7)], [(2, 4), (3.5, 5.5), (8, 9)])
    assert exposed_intervals(shown) == [(3, 5), (8, 9)]
    assert exposed_s(shown) == 3
    assert exposed_s(timeline([], [(0, 1)])) == 1
    assert exposed_s(timeline([(0, 1)], [])) == 0


def test_exposed_time_of_a_simulation_is_what_it_says_itself():
    operations = [
        Operation(f"{k}{j}", COMPUTE if k % 2 == 0 else TP, 1e-3 * (1 + (k + j) % 3), before)
        for j in range(3)
        for k in range(6)
        for before in [(6 * j + k - 1,) if k else ()]
    ]
    for done in (list_schedule(operations, [(0.0,)] * 18), simulate(operations, range(18))):
        assert done.exposed_s > 0
        assert exposed_s(done.timeline()) == pytest.approx(done.exposed_s)


def test_without_communication_there_is_nothing_to_report():
    with pytest.raises(GraphError, match="nothing is hidden where nothing is sent"):
        replace(TIMES, unsplit_s=10.0)
    with pytest.raises(GraphError, match="must take longer"):
        replace(TIMES, split_s=10.5)


def test_the_text_has_every_figure_of_every_direction():
    text = str(REPORT)
    rows = {line[:25].strip(): line[25:].split() for line in text.splitlines()}
    assert rows["net hidden"] == ["62.5%", "62.5%"]
    assert rows["replicas"] == ["2", "2"]
    assert rows["communication / compute"] == ["0.40", "0.40"]
    assert rows["trace-exposed"] == ["12.5%", "-"]
    assert rows["T0   unsplit, ms"] == ["14000.000", "14000.000"]
    assert text.endswith("tp: 8 ranks")


def test_json_has_figures_and_seconds():
    read = json.loads(REPORT.to_json())
    assert read["axis"] == "tokens"
    assert read["directions"]["forward"]["figures"]["replicas"] == 2
    assert read["directions"]["forward"]["figures"]["net hidden"] == pytest.approx(0.625)
    assert read["directions"]["backward"]["seconds"]["overlapped_s"] == 11.5


def test_the_trace_holds_a_process_for_each_run_and_two_streams_in_each():
    events = REPORT.to_chrome_trace()["traceEvents"]
    named = {x["pid"]: x["args"]["name"] for x in events if x["name"] == "process_name"}
    assert named == {0: "forward, unsplit", 1: "forward, 2 replicas"}
    leaves = [(x["pid"], x["tid"]) for x in events if x["ph"] == "X"]
    assert {pid for pid, _ in leaves} == {0, 1}
    assert {tid for _, tid in leaves} == {0, 1}
    assert len(leaves) == sum(len(shown.events) for _, shown in REPORT.timelines())


def boxes(root, kind):
    return [
        (float(box.get("x")), float(box.get("width")), float(box.get("y")))
        for box in root.iter(f"{SVG}rect")
        if box.get("class") == kind
    ]


def test_the_picture_is_drawn_to_one_scale():
    root = ElementTree.fromstring(picture(REPORT.timelines()))
    products = boxes(root, "product")
    assert len(products) == 4
    ends = [max(x + width for x, width, y in products if y == at) for at in (24, 24 + 76)]
    left = 110
    assert (ends[1] - left) / (ends[0] - left) == pytest.approx(11.5 / 14, abs=1e-3)
    (exposed_first, exposed_second) = boxes(root, "exposed")
    assert exposed_first[1] / exposed_second[1] == pytest.approx(4 / 0.5, rel=0.02)


def test_many_tiny_events_become_few_boxes():
    computing = [(i * 1e-6, (i + 1) * 1e-6) for i in range(20_000)]
    root = ElementTree.fromstring(picture([("many", timeline(computing, []))]))
    assert 500 < len(boxes(root, "product")) < 3000


def test_the_page_stands_alone_and_escapes_names():
    text = page(REPORT)
    assert "Llama &lt;small&gt;" in text
    assert "<small>" not in text
    assert text.count("<svg") == 1  # only forward has timelines
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert '<tr class="headline"><td>net hidden</td><td>62.5%</td><td>62.5%</td></tr>' in text

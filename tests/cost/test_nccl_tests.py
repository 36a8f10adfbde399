import pytest

from plait.cost.collectives import Collective
from plait.cost.nccl_tests import read_measured
from plait.errors import PlanError

COLUMNS = "collective,num_ranks,ranks_per_node,num_bytes,time_us\n"
TEXT = """
# Collective test starting: all_reduce_perf
# nThread 1 nGpus 2 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 5 iters: 20
# Using devices
#  Rank  0 Group  0 Pid   1 on     node-a device  0 [0x1b] NVIDIA H100
#  Rank  1 Group  0 Pid   2 on     node-a device  1 [0x1c] NVIDIA H100
#  Rank  2 Group  0 Pid   3 on     node-b device  0 [0x1b] NVIDIA H100
#  Rank  3 Group  0 Pid   4 on     node-b device  1 [0x1c] NVIDIA H100
#
#       size         count      type   redop    root     time   algbw   busbw #wrong     time
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)
        1024           256     float     sum      -1    10.00    0.10    0.15      0    10.10
        4096          1024     float     sum      -1    40.00    0.10    0.15      0    40.10
# Avg bus bandwidth    : 0.15
"""


def test_the_text_of_a_run_says_collective_ranks_nodes_and_times(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(TEXT)
    (run,) = read_measured(path)
    assert (run.collective, run.num_ranks, run.ranks_per_node) == (Collective.ALL_REDUCE, 4, 2)
    assert run.at(1024) == pytest.approx(10e-6)
    assert run.at(2048) == pytest.approx(20e-6)
    assert run.at(1) == pytest.approx(10e-6)
    assert run.at(40_960) == pytest.approx(400e-6)


def test_a_csv_holds_several_runs(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        "collective,num_ranks,ranks_per_node,num_bytes,time_us\n"
        "all_reduce,8,8,1000,5\nall_gather,8,8,1000,3\nall_gather,8,8,2000,6\n"
    )
    runs = read_measured(path)
    assert [(run.collective.value, len(run.num_bytes)) for run in runs] == [
        ("all_reduce", 1),
        ("all_gather", 2),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "collective,num_ranks\n", "lacks ranks_per_node, num_bytes, time_us"),
        ("a.csv", "collective,num_ranks,ranks_per_node,num_bytes,time_us\nsum,8,8,1,1\n", "line 2"),
        ("a.txt", "nothing here", "names none of all_reduce_perf"),
        ("a.txt", TEXT.replace("float     sum", "float"), "line 12: expected size"),
        ("a.txt", TEXT.replace(" on ", " at "), "there is no line"),
        ("a.txt", TEXT.replace("10.00", "0.00"), "line 12: 1024 bytes take 0 us. Times above zero"),
        ("a.txt", TEXT.replace("10.00", "nan"), "line 12: 1024 bytes take nan us"),
        ("a.txt", TEXT.replace("40.00", "inf"), "line 13: 4096 bytes take inf us"),
        ("a.csv", f"{COLUMNS}all_reduce,8,8,1,5\nall_reduce,8,8,2,nan\n", "line 3: 2 bytes take"),
        ("a.csv", f"{COLUMNS}\nall_reduce,8,8,1,-inf\n", "line 3: 1 bytes take -inf us"),
        ("a.csv", f"{COLUMNS}all_reduce,8,8,1,-5\n", "line 2: 1 bytes take -5 us"),
        ("a.csv", f"{COLUMNS}all_reduce,-8,8,1,5\n", "line 2: num_ranks=-8"),
        ("a.csv", f"{COLUMNS}all_reduce,8,8,0,5\n", "no sizes for all_reduce of 8 ranks"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_measured(path)


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_a_binary_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(PlanError, match=f"{name} is not text"):
        read_measured(path)

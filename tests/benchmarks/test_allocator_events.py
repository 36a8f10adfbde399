"""The truth of the dry run: frees that PyTorch's profiler is not told of are found by address."""

import threading

import torch

from benchmarks.allocator_events import Change, record, totals_of

MIB = 2**20


def totals(*changes):
    found, unseen = totals_of([Change(i, *each) for i, each in enumerate(changes)])
    return [x for _, x in found], [x for _, x in unseen]


def test_allocations_and_frees_add_up():
    assert totals((100, 10), (200, 20), (100, -10)) == ([10, 30, 20], [])


def test_a_block_that_overlaps_others_shows_that_they_were_freed():
    found, unseen = totals((100, 10), (110, 10), (120, 10), (105, 10))
    assert found == [10, 20, 30, 20]
    assert unseen == [20]


def test_a_free_that_is_reported_late_counts_once():
    found, unseen = totals((100, 10), (100, 16), (100, -16), (100, -16))
    assert found == [10, 16, 0, 0]
    assert unseen == [10]


def test_memory_that_another_thread_frees_does_not_add_up():
    # As gloo's threads do; 64 MiB are mapped, and the next mapping of that size takes their place.
    num_rounds = 6

    def run(mark):
        mark("start")
        for _ in range(num_rounds):
            kept = [torch.empty(64 * MIB, dtype=torch.uint8)]
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
        mark("end")

    found = record(run)
    assert 64 * MIB <= found.peak("start", "end") < 3 * 64 * MIB
    assert len(found.unseen) >= num_rounds - 2

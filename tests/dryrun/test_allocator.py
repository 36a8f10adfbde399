"""The model of the CUDA caching allocator: closed forms of its rules."""

import pytest

from plait.dryrun.allocator import CachingAllocator, with_fragments
from plait.errors import PlanError

MIB = 2**20


def test_a_small_request_reserves_two_mebibytes_and_takes_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(0, 1)
    assert (allocator.reserved_bytes, allocator.used_bytes) == (2 * MIB, 512)


def test_small_requests_share_a_segment_until_it_is_full():
    allocator = CachingAllocator()
    for number in range(4096):
        allocator.allocate(number, 512)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(4096, 512)
    assert allocator.reserved_bytes == 4 * MIB


@pytest.mark.parametrize(
    ("num_bytes", "reserved"),
    [(MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)],
)
def test_the_segment_of_a_request_is_as_long_as_pytorch_makes_it(num_bytes, reserved):
    assert with_fragments([(0, num_bytes)]).peak_bytes == reserved


def test_a_rest_of_a_large_block_is_cut_off_only_above_a_mebibyte():
    cut, whole = CachingAllocator(), CachingAllocator()
    for allocator, size in ((cut, 18 * MIB), (whole, 19 * MIB)):
        allocator.allocate(0, 20 * MIB)
        allocator.free(0)
        allocator.allocate(1, size)
    assert (cut.used_bytes, whole.used_bytes) == (18 * MIB, 20 * MIB)


def test_the_smallest_block_that_fits_is_taken():
    allocator = CachingAllocator()
    for number, size in enumerate((40, 30, 32)):
        allocator.allocate(number, size * MIB)
    for number in range(3):
        allocator.free(number)
    allocator.allocate(3, 31 * MIB)
    assert allocator.blocks[3].size == 32 * MIB


def test_free_neighbours_become_one_block():
    allocator = CachingAllocator()
    for number in range(4):
        allocator.allocate(number, 5 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    for number in (1, 3, 2, 0):
        allocator.free(number)
    allocator.allocate(4, 20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_fragments_make_a_run_reserve_more_than_it_uses_and_expandable_segments_less_of_that():
    growing = []
    for number in range(8):  # each is larger than what was freed before
        growing += [(number, (20 + 4 * number) * MIB), (number, -1)]
    plain, expandable = with_fragments(growing), with_fragments(growing, expandable=True)
    assert plain.used_bytes == expandable.used_bytes == 48 * MIB
    assert plain.peak_bytes == sum(20 + 4 * number for number in range(8)) * MIB
    assert expandable.peak_bytes == 60 * MIB


def test_a_full_device_gives_back_free_segments_first_and_then_says_what_is_missing():
    requests = [(0, 30 * MIB), (0, -1), (1, 40 * MIB)]
    assert with_fragments(requests, limit_bytes=64 * MIB).fits
    found = with_fragments([*requests, (2, 30 * MIB)], limit_bytes=64 * MIB)
    assert not found.fits
    assert found.needed_bytes == 70 * MIB


def test_all_that_is_freed_can_be_used_again():
    requests = [(n, (n % 13 + 1) * 700_000) for n in range(60)]
    requests += [(n, -1) for n in range(60)]
    once = with_fragments(requests)
    again = with_fragments(requests + [(n + 60, size) for n, size in requests if size > 0])
    assert again.peak_bytes == once.peak_bytes
    assert with_fragments([]).peak_bytes == 0


def test_a_negative_device_is_refused():
    with pytest.raises(PlanError, match="cannot have -1 bytes"):
        CachingAllocator(limit_bytes=-1)

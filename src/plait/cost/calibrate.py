"""A device's figures from operators that were measured on it."""

from collections.abc import Sequence
from dataclasses import replace

from plait.cost.clusters import Device
from plait.cost.operations import Cost, Kind

Sample = tuple[Cost, float]
"""What an operator does, and how long it took, in seconds."""


def fit_device(device: Device, samples: Sequence[Sample]) -> Device:
    """Fit bandwidth, arithmetic and attention so that the times of each kind add up as measured.

    What no sample speaks of stays as it was. The time of products is arithmetic and the moving of
    operands, one after the other (`Device.matrix_efficiency_at`); the second is known from the
    bandwidth, the first is what is left. Of each dtype the peak is fitted, at the device's
    matrix_efficiency, and one attention_efficiency for all.
    """
    moved = [(cost.bytes, time_s) for cost, time_s in samples if cost.kind is Kind.MEMORY]
    moved_s = sum(time_s for _, time_s in moved)
    if moved_s > 0:
        bandwidth = sum(num_bytes for num_bytes, _ in moved) / moved_s
        device = replace(device, memory_bandwidth_bytes_per_s=bandwidth)
    peaks = dict(device.peak_flops_per_s)
    products = [(cost, s) for cost, s in samples if cost.kind is Kind.MATRIX and cost.flops]
    for dtype in {cost.dtype for cost, _ in products}:
        same = [(cost, time_s) for cost, time_s in products if cost.dtype == dtype]
        whole_s = sum(time_s for _, time_s in same)
        reading_s = sum(_moving_s(cost, device) for cost, _ in same)
        # Products that are all reading would have no arithmetic left; a tenth is taken to be it.
        arithmetic_s = max(whole_s - reading_s, whole_s / 10)
        flops = sum(cost.flops for cost, _ in same)
        peaks[dtype] = flops / arithmetic_s / device.matrix_efficiency
    device = replace(device, peak_flops_per_s=peaks)
    attention = [(cost, s) for cost, s in samples if cost.kind is Kind.ATTENTION and s > 0]
    if attention:
        at_peak_s = sum(cost.flops / device.peak(cost.dtype) for cost, _ in attention)
        share = at_peak_s / sum(time_s for _, time_s in attention)
        device = replace(device, attention_efficiency=share)
    return device


def _moving_s(cost: Cost, device: Device) -> float:
    """The part of a product's time that `matrix_efficiency_at` gives to its operands."""
    if cost.sizes is None:
        return 0.0
    shares = sum(1 / size for size in cost.sizes)
    return cost.flops * shares * cost.dtype.itemsize / 2 / device.memory_bandwidth_bytes_per_s

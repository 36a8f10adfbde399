"""Accelerators besides Hopper, and every cluster by name.

Peaks and bandwidths are the makers' figures, without sparsity; where a share of them is assumed,
it says so. Latencies are assumed as in `clusters.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from plait.cost.clusters import Cluster, Device, Link, cpu, h100, h200
from plait.errors import PlanError, nearest_name

# What one rank's adapter carries in one direction, 90 % of the line rate (assumed; as for h100).
INFINIBAND_HDR = Link(latency_s=15e-6, bandwidth_bytes_per_s=22.5e9, step_latency_s=2e-6)
INFINIBAND_NDR = Link(latency_s=15e-6, bandwidth_bytes_per_s=45e9, step_latency_s=2e-6)
# Over Ethernet the headers are larger and congestion is met later: 85 % (assumed).
ROCE_200 = Link(latency_s=20e-6, bandwidth_bytes_per_s=21e9, step_latency_s=3e-6)
ROCE_400 = Link(latency_s=20e-6, bandwidth_bytes_per_s=42.5e9, step_latency_s=3e-6)
# x16: 32 and 64 GB/s in one direction [PCI-SIG]; 80 % reaches the other card (assumed).
PCIE_4 = Link(latency_s=10e-6, bandwidth_bytes_per_s=25e9, step_latency_s=2e-6)
PCIE_5 = Link(latency_s=10e-6, bandwidth_bytes_per_s=50e9, step_latency_s=2e-6)

_ELDER_BLAS_BYTES = (2 * 4096 + 8 * 16) * 1024
"""Of what is neither Hopper nor Blackwell [CublasHandlePool.cpp in aten/src/ATen/cuda, where gfx94
has 128 MiB]."""


def a100(num_ranks: int) -> Cluster:
    """A100 SXM 80 GB, 8 in a node, one 200 Gb/s adapter for each.

    [NVIDIA A100 datasheet, 2021: dense BF16 312, TF32 156, FP64 tensor 19.5 TFLOP/s, 2,039 GB/s,
    NVLink 600 GB/s both ways; DGX A100 datasheet: 8 adapters of 200 Gb/s.] Of NVLink's 300 GB/s in
    one direction NCCL reaches about 235 [github.com/NVIDIA/nccl-tests/issues/149]; 230 here. The
    share of large products is 0.75: cuBLAS reaches 230 to 250 TFLOP/s at this chip's power
    (assumed). Attention 0.6 [FlashAttention-2, arXiv 2307.08691, fig. 4 to 6: about 190 of 312
    causal with heads of 128].
    """
    device = Device(
        name="a100",
        peak_flops_per_s={
            torch.bfloat16: 312e12,
            torch.float16: 312e12,
            torch.float32: 156e12,
            torch.float64: 19.5e12,
        },
        memory_bandwidth_bytes_per_s=2.039e12,
        memory_bytes=80 * 10**9,
        launch_s=3e-6,
        blas_workspace_bytes=_ELDER_BLAS_BYTES,
        matrix_efficiency=0.75,
        attention_efficiency=0.6,
    )
    return _nodes_of_8(
        "a100", num_ranks, device, Link(latency_s=5e-6, bandwidth_bytes_per_s=230e9), INFINIBAND_HDR
    )


def h100_pcie(num_ranks: int) -> Cluster:
    """H100 PCIe, 8 in a node without NVLink [NVIDIA H100 datasheet: BF16 756 TFLOP/s, 2 TB/s]."""
    device = replace(
        h100(1).device,
        name="h100_pcie",
        peak_flops_per_s={
            torch.float8_e4m3fn: 1513e12,
            torch.float8_e5m2: 1513e12,
            torch.bfloat16: 756e12,
            torch.float16: 756e12,
            torch.float32: 51e12,
            torch.float64: 26e12,
        },
        memory_bandwidth_bytes_per_s=2e12,
        host_bandwidth_bytes_per_s=50e9,
    )
    return _nodes_of_8("h100_pcie", num_ranks, device, PCIE_5, INFINIBAND_NDR)


def b200(num_ranks: int) -> Cluster:
    """B200 SXM, 8 in a node, one 400 Gb/s adapter for each.

    [NVIDIA DGX B200 datasheet, for 8: FP8 72 and BF16 36 PFLOP/s with sparsity, half without; 1,440
    GB, 64 TB/s; NVLink 1.8 TB/s both ways a GPU; 8 adapters of 400 Gb/s.] Of 900 GB/s in one
    direction 700 are taken to be reached, as on Hopper; shares of the peak as on Hopper (assumed).
    """
    hopper = h100(1).device
    device = replace(
        hopper,
        name="b200",
        peak_flops_per_s={
            torch.float8_e4m3fn: 4500e12,
            torch.float8_e5m2: 4500e12,
            torch.bfloat16: 2250e12,
            torch.float16: 2250e12,
            torch.float32: 75e12,
            torch.float64: 37e12,
        },
        memory_bandwidth_bytes_per_s=8e12,
        memory_bytes=180 * 10**9,
        host_bandwidth_bytes_per_s=50e9,
    )
    return _nodes_of_8(
        "b200", num_ranks, device, Link(latency_s=5e-6, bandwidth_bytes_per_s=700e9), INFINIBAND_NDR
    )


def mi300x(num_ranks: int) -> Cluster:
    """MI300X, 8 in a node, one 400 Gb/s adapter for each.

    [AMD Instinct MI300X data sheet: dense BF16 1,307.4, FP8 2,614.9, FP32 matrix 163.4, FP64 matrix
    163.4 TFLOP/s; 192 GB, 5.3 TB/s; seven Infinity Fabric links of 64 GB/s in one direction.] Of
    448 GB/s, 310 are taken to be reached, 0.5 of the peak by products and 0.3 by attention
    (assumed).
    """
    device = Device(
        name="mi300x",
        peak_flops_per_s={
            torch.float8_e4m3fn: 2614.9e12,
            torch.float8_e5m2: 2614.9e12,
            torch.bfloat16: 1307.4e12,
            torch.float16: 1307.4e12,
            torch.float32: 163.4e12,
            torch.float64: 163.4e12,
        },
        memory_bandwidth_bytes_per_s=5.3e12,
        memory_bytes=192 * 10**9,
        launch_s=5e-6,
        blas_workspace_bytes=128 * 2**20,
        matrix_efficiency=0.5,
        attention_efficiency=0.3,
        host_bandwidth_bytes_per_s=50e9,
    )
    return _nodes_of_8(
        "mi300x", num_ranks, device, Link(latency_s=8e-6, bandwidth_bytes_per_s=310e9), ROCE_400
    )


def ascend_910b(num_ranks: int) -> Cluster:
    """Ascend 910B, 8 in a node, one 200 Gb/s RoCE adapter for each.

    One die of the 910C is taken for a 910B [CloudMatrix384, arXiv 2506.12708, section 3.3: 376
    TFLOP/s BF16, 1.6 TB/s and 64 GB a die]. Eight are joined each with each by HCCS, seven links
    of 28 GB/s in one direction, of which 150 of 196 GB/s are taken to be reached; 0.65 of the peak
    by products, 0.45 by attention, float32 at a quarter (assumed).
    """
    device = Device(
        name="ascend_910b",
        peak_flops_per_s={
            torch.bfloat16: 376e12,
            torch.float16: 376e12,
            torch.float32: 94e12,
        },
        memory_bandwidth_bytes_per_s=1.6e12,
        memory_bytes=64 * 10**9,
        launch_s=5e-6,
        matrix_efficiency=0.65,
        attention_efficiency=0.45,
    )
    return _nodes_of_8(
        "ascend_910b",
        num_ranks,
        device,
        Link(latency_s=10e-6, bandwidth_bytes_per_s=150e9),
        ROCE_200,
    )


CLUSTERS: Mapping[str, Callable[[int], Cluster]] = {
    "a100": a100,
    "h100": h100,
    "h100_pcie": h100_pcie,
    "h200": h200,
    "b200": b200,
    "mi300x": mi300x,
    "ascend_910b": ascend_910b,
    "cpu": cpu,
}


GPUS: Mapping[str, str] = {
    "A100": "a100",
    "H100": "h100",
    "GH200": "h100",
    "H100 PCIe": "h100_pcie",
    "H200": "h200",
    "B200": "b200",
    "MI300X": "mi300x",
}
"""Clusters, by what the names of their GPUs hold."""
_OTHER_GPUS = ("H100 NVL",)  # by its name an H100, by its figures none


def find_cluster(name: str, num_ranks: int) -> Cluster:
    """The cluster of that name with so many ranks. Raises PlanError with the nearest name."""
    if name not in CLUSTERS:
        raise PlanError(f"there is no cluster {name!r}. {nearest_name(name, CLUSTERS)}")
    return CLUSTERS[name](num_ranks)


def cluster_of_gpu(gpu: str) -> str:
    """Name of the cluster that has GPUs of this name (as of `torch.cuda.get_device_name`).

    Raises PlanError with the known GPUs if no cluster has.
    """
    found = longest_in(gpu, (*GPUS, *_OTHER_GPUS))
    if found is None or found in _OTHER_GPUS:
        raise PlanError(
            f"there are no figures of a GPU {gpu!r}. Known are {', '.join(GPUS)}. Describe it as a "
            "Device and learn its table with plait.dryrun.learn.learn_table."
        )
    return GPUS[found]


def longest_in(gpu: str, names: Iterable[str]) -> str | None:
    """The longest of the names that stands in a GPU's in whole words; None if none does."""
    known = [name for name in names if re.search(rf"\b{re.escape(name)}\b", gpu)]
    return max(known, key=len, default=None)


def _nodes_of_8(name: str, num_ranks: int, device: Device, inside: Link, between: Link) -> Cluster:
    return Cluster(
        name=name,
        device=device,
        num_ranks=num_ranks,
        ranks_per_node=8,
        inside=inside,
        between=between,
    )

"""Machines: what a device computes and moves, what a link carries, and what a cluster is.

Bandwidths of links are what one rank sends, in one direction, with the protocol's overhead taken
off. Peaks are those of dense products. A figure that was not published is marked (fitted) or
(assumed). Hopper and the CPU are here, other devices in `accelerators.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from plait.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a cluster.

    peak_flops_per_s: of dense products, by dtype. matrix_efficiency: the share of it that a product
    of large sizes reaches. attention_efficiency: the same share for fused attention. launch_s: the
    least that an operation takes. blas_workspace_bytes: what PyTorch's allocator serves to the
    library of products before the first one, and never gets back (CublasHandlePool.cpp in
    aten/src/ATen/cuda: 32 MiB for Hopper and Blackwell); a CPU has none.
    """

    name: str
    peak_flops_per_s: Mapping[torch.dtype, float]
    memory_bandwidth_bytes_per_s: float
    memory_bytes: int
    launch_s: float
    matrix_efficiency: float
    attention_efficiency: float
    host_bandwidth_bytes_per_s: float = 25e9  # PCIe 4.0 x16, 32 GB/s by its standard (assumed 80 %)
    interference: float = 1.19
    blas_workspace_bytes: int = 32 * 2**20

    def peak(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s for products of this dtype; that of float32 for one that is not listed."""
        return self.peak_flops_per_s.get(dtype, self.peak_flops_per_s[torch.float32])

    def matrix_efficiency_at(
        self, rows: int, inner: int, columns: int, *, dtype: torch.dtype
    ) -> float:
        """Share of the peak that a product (rows, inner) by (inner, columns) reaches.

        Arithmetic at e = matrix_efficiency, and operands and result moved once, one after the other
        [a bound from above by the roofline of Williams et al. 2009, doi:10.1145/1498765.1498785]:

            e / (1 + h / rows + h / inner + h / columns),  h = size / 2 * e * peak / bandwidth

        With few rows that is e * rows / (rows + h): reading the weight does not shrink with them.
        """
        bytes_per_flop = dtype.itemsize / 2 / self.memory_bandwidth_bytes_per_s
        h = bytes_per_flop * self.matrix_efficiency * self.peak(dtype)
        return self.matrix_efficiency / (1 + h / rows + h / inner + h / columns)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the ranks of a mesh axis.

    latency_s: once for each collective. step_latency_s: for each step of its ring.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    step_latency_s: float = 0.0

    def __post_init__(self) -> None:
        """Check the figures."""
        if self.latency_s < 0 or self.step_latency_s < 0:
            raise PlanError(f"a latency cannot be negative: {self}.")
        if not self.bandwidth_bytes_per_s > 0:
            raise PlanError(f"a link's bandwidth must be positive: {self}.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """num_ranks devices, ranks_per_node of them joined by `inside`, the nodes by `between`.

    links: the links of mesh axes that are known better, by the axis' name.
    """

    name: str
    device: Device
    num_ranks: int
    ranks_per_node: int
    inside: Link
    between: Link
    links: Mapping[str, Link] = field(default_factory=dict[str, Link])

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.num_ranks < 1 or self.ranks_per_node < 1:
            raise PlanError(
                f"a cluster needs ranks, got {self.num_ranks}, {self.ranks_per_node} in a node."
            )

    def link(self, axis: str, *, size: int, stride: int = 1) -> Link:
        """The link of a mesh axis of that size, whose neighbours are `stride` ranks apart.

        Without an entry in `links`, an axis that fits in a node uses what joins the node.
        """
        if axis in self.links:
            return self.links[axis]
        return self.inside if size * stride <= self.ranks_per_node else self.between


def h100(num_ranks: int) -> Cluster:
    """H100 SXM, 8 in a node [NVIDIA H100 datasheet: dense BF16 989 TFLOP/s, 3.35 TB/s, 80 GB]."""
    return _hopper("h100", num_ranks, bandwidth_bytes_per_s=3.35e12, memory_bytes=80 * 10**9)


def h200(num_ranks: int) -> Cluster:
    """H200 SXM, 8 in a node [NVIDIA H200 datasheet: dense BF16 989 TFLOP/s, 4.8 TB/s, 141 GB]."""
    return _hopper("h200", num_ranks, bandwidth_bytes_per_s=4.8e12, memory_bytes=141 * 10**9)


def cpu(num_ranks: int = 1) -> Cluster:
    """One core of a server processor for each rank, in one node (assumed; calibrate before use).

    A core with two 512-bit units for fused multiply-add does 64 FLOP of float32 in a cycle; at
    1.5 GHz under such load that is 0.1 TFLOP/s, and a share of memory bandwidth near 10 GB/s.
    """
    device = Device(
        name="cpu",
        peak_flops_per_s={torch.float32: 1e11, torch.bfloat16: 4e11, torch.float64: 5e10},
        memory_bandwidth_bytes_per_s=1e10,
        memory_bytes=16 * 2**30,
        launch_s=5e-6,
        matrix_efficiency=0.7,
        attention_efficiency=0.4,
        blas_workspace_bytes=0,
    )
    link = Link(latency_s=50e-6, bandwidth_bytes_per_s=2e9)
    return Cluster(
        name="cpu",
        device=device,
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        inside=link,
        between=link,
    )


def _hopper(
    name: str, num_ranks: int, *, bandwidth_bytes_per_s: float, memory_bytes: int
) -> Cluster:
    """A DGX node of Hopper SXM devices.

    Peaks: datasheet figures without sparsity. NVLink: 450 GB/s in one direction; NCCL reaches about
    370 [github.com/NVIDIA/nccl-tests/issues/212]; 350 here. Between nodes: one 400 Gb/s adapter for
    each rank, 50 GB/s, 45 here (assumed). Latencies (assumed): 5 us, 15 us between nodes. The share
    of 0.65 is a usual one for large bfloat16 products under the chip's power limit (assumed);
    attention 0.5 [FlashAttention-3, arXiv 2407.08608, fig. 5: 450 to 650 of 989 TFLOP/s].
    """
    peak_bfloat16 = 989e12
    device = Device(
        name=name,
        peak_flops_per_s={
            torch.float8_e4m3fn: 1979e12,
            torch.float8_e5m2: 1979e12,
            torch.bfloat16: peak_bfloat16,
            torch.float16: peak_bfloat16,
            torch.float32: 67e12,
            torch.float64: 34e12,
        },
        memory_bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        memory_bytes=memory_bytes,
        launch_s=3e-6,  # (assumed) between kernels of one stream, without a CUDA graph
        matrix_efficiency=0.65,
        attention_efficiency=0.5,
    )
    return Cluster(
        name=name,
        device=device,
        num_ranks=num_ranks,
        ranks_per_node=8,
        inside=Link(latency_s=5e-6, bandwidth_bytes_per_s=350e9),
        between=Link(latency_s=15e-6, bandwidth_bytes_per_s=45e9, step_latency_s=2e-6),
    )

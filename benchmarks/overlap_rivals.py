"""What people use today, on the same delayed links.

Eager, torch.compile, Inductor's own overlap scheduling, and a batch split written by hand in the
manner of Domino.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor
import torch.distributed as dist
import torch.utils._runtime_estimation
from torch import Tensor, fx
from torch._inductor.fx_passes import node_runtime_estimation

from plait.cost.clusters import Cluster, Link
from plait.cost.collectives import collective_of, collective_s
from plait.cost.operations import cost_of, operation_s
from plait.executor.delayed_process_group import DelayedProcessGroup
from plait.executor.timed_rounds import Seconds
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.attention import AttentionInputs
from plait.nn.rotary import rotation_tables
from plait.ops.linear_cross_entropy import linear_cross_entropy
from plait.plan.parallel_plan import ParallelPlan

os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


class Placed:
    """The model, spread over tp ranks as Plait captures it, as a plain module of rank 0.

    group: the name by which its collectives find their process group.
    """

    def __init__(self, config: DecoderConfig, tp: int, dtype: torch.dtype) -> None:
        self.model = Decoder(config)
        self.model.initialize()
        plan = ParallelPlan(tp=tp)
        with plan_mesh(plan) as mesh:
            self.group = str(mesh["tp"].get_group().group_name)
            keep_local_parameters(parallelize(self.model, plan, mesh))
        self.model.to(dtype)

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens themselves."""
        return self.model.loss(self.model(tokens_BT), tokens_BT) / tokens_BT.numel()

    def step(self, loss: Callable[[Tensor], Tensor], tokens_BT: Tensor) -> Seconds:
        """Run a step under autograd, and say what each direction took."""
        self.model.zero_grad(set_to_none=True)
        began_s = time.perf_counter()
        value = loss(tokens_BT)
        turn_s = time.perf_counter()
        value.backward()
        return {"forward": turn_s - began_s, "backward": time.perf_counter() - turn_s}


@contextmanager
def alone() -> Iterator[None]:
    """A default process group of this process, over which the overlap scheduler agrees on times."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def aot_eager(placed: Placed) -> Callable[[Tensor], Tensor]:
    """Eager's kernels from one graph: what O0 must not be slower than."""
    torch._dynamo.reset()
    return torch.compile(placed.loss, backend="aot_eager")


def compiled(
    placed: Placed, tokens_BT: Tensor, cluster: Cluster | None = None, link: Link | None = None
) -> Callable[[Tensor], Tensor]:
    """Inductor's program, compiled; with a link, ordered by its overlap scheduling.

    The scheduler is told what messages take on that link, and what products take on that cluster.
    """
    torch._dynamo.reset()
    patch: dict[str, Any] = {"force_disable_caches": True}
    roofline: dict[str, Any] = {}
    if cluster is not None and link is not None:
        device = cluster.device
        # Where it asks for the figures of a GPU, it gets those of this machine.
        roofline = {
            "get_device_tflops": lambda dtype: device.peak(dtype) / 1e12,
            "get_gpu_dram_gbps": lambda: device.memory_bandwidth_bytes_per_s / 1e9,
        }
        estimate = _Estimate(cluster, link)
        patch["aten_distributed_optimizations.enable_overlap_scheduling"] = True
        patch["aten_distributed_optimizations.compute_estimator"] = "analytical"
        patch["aten_distributed_optimizations.custom_runtime_estimation"] = estimate
    function = torch.compile(placed.loss)
    with ExitStack() as stack:
        stack.enter_context(inductor.patch(patch))
        if roofline:
            stack.enter_context(mock.patch.multiple(torch.utils._runtime_estimation, **roofline))
            # It would log NCCL's estimate of messages beside ours, and asks c10d for the group.
            stack.enter_context(
                mock.patch.object(node_runtime_estimation, "_log_collective_benchmarks")
            )
        placed.step(function, tokens_BT)  # compiles forward and backward
    return function


class _Estimate:
    def __init__(self, cluster: Cluster, link: Link) -> None:
        self.cluster, self.link = cluster, link

    def __call__(self, node: fx.Node, override_size: int | None = None) -> float | None:
        """Milliseconds of a collective or of an operator that computes; None: unknown."""
        kind = collective_of(str(node.target))
        if kind is not None:
            value = node.meta["val"]
            operand = node.all_input_nodes[0].meta["val"]
            sizes = [x.numel() * x.element_size() for x in (value, operand)]
            num_bytes = override_size if override_size is not None else max(sizes)
            return 1e3 * collective_s(kind, num_bytes, self.cluster.num_ranks, self.link)
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])  # type: ignore[misc]
        cost = cost_of(str(node.target), args, kwargs, node.meta["val"])
        return 1e3 * operation_s(cost, self.cluster.device)


class HalfBatches:
    """A step in two half batches whose all-reduces are waited for late, in plain PyTorch.

    After Domino [Wang et al. 2024, arXiv 2409.15241, section 4.1, row split of inputs]: while the
    sum of one half travels, the other half is computed, in the forward as in the backward.
    """

    def __init__(
        self, config: DecoderConfig, tp: int, dtype: torch.dtype, tokens_BT: Tensor
    ) -> None:
        local = {
            "num_heads": config.num_heads // tp,
            "num_kv_heads": config.num_kv_heads // tp,
            "intermediate_size": config.intermediate_size // tp,
        }
        # A decoder with a rank's share of heads and features: each block yields a partial sum.
        self.model = Decoder(DecoderConfig(**(vars(config) | local)))
        self.model.initialize()
        self.model.to(dtype)
        self.halves = [x.contiguous() for x in tokens_BT.chunk(2)]
        positions_BT = torch.arange(tokens_BT.shape[1])[None]
        tables = rotation_tables(config.rope, positions_BT, config.head_size)
        self.shared = AttentionInputs(*tables, None, None)

    def step(self, group: DelayedProcessGroup) -> Seconds:
        """Run a step, and say what each direction took."""
        self.group = group
        self.model.zero_grad(set_to_none=True)
        began_s = time.perf_counter()
        records, losses = self._forward()
        turn_s = time.perf_counter()
        self._backward(records, losses)
        return {"forward": turn_s - began_s, "backward": time.perf_counter() - turn_s}

    def _blocks(self) -> list[tuple[Any, Callable[[Tensor], Tensor]]]:
        """Each norm, and what comes after it up to a partial sum."""
        found: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
        for layer in self.model.layers:
            attention = layer.self_attn
            found.append((layer.input_layernorm, lambda n, a=attention: a(n, self.shared)))
            found.append((layer.post_attention_layernorm, layer.mlp))
        return found

    def _forward(self) -> tuple[list[list[Any]], list[Any]]:
        embedded = [self.model.embed_tokens(x) for x in self.halves]
        streams = [x.detach() for x in embedded]
        pending: list[Any] = [None, None]
        records: list[list[Any]] = [list(embedded)]
        for norm, block in self._blocks():
            entries: list[Any] = []
            for half in (0, 1):
                if pending[half] is not None:
                    streams[half] = _arrived(streams[half], pending[half])
                x = streams[half].detach().requires_grad_()
                normed = norm(x)
                leaf = normed.detach().requires_grad_()
                partial = block(leaf)
                pending[half] = self._sum(partial.detach())
                entries.append((x, normed, leaf, partial))
            records.append(entries)
        losses = []
        for half in (0, 1):
            x = _arrived(streams[half], pending[half]).detach().requires_grad_()
            hidden_MD = self.model.norm(x).flatten(0, 1)
            tokens_M = self.halves[half].flatten()
            loss = linear_cross_entropy(hidden_MD, self.model.lm_head.weight, tokens_M)
            losses.append((x, loss / (2 * tokens_M.numel())))
        return records, losses

    def _backward(self, records: list[list[Any]], losses: list[Any]) -> None:
        gradients = []
        for x, loss in losses:
            loss.backward()
            gradients.append(x.grad)
        pending: list[Any] = [None, None]
        while len(records) > 1:
            entries = records.pop()
            for half, (x, normed, leaf, partial) in enumerate(entries):
                if pending[half] is not None:
                    gradients[half] = _through_norm(gradients[half], *pending[half])
                partial.backward(gradients[half])
                pending[half] = (self._sum(leaf.grad), normed, x)
        for half, embedded in enumerate(records[0]):
            embedded.backward(_through_norm(gradients[half], *pending[half]))

    def _sum(self, x: Tensor) -> tuple[Any, Tensor]:
        return self.group.allreduce([x]), x


def _arrived(x: Tensor, pending: tuple[Any, Tensor]) -> Tensor:
    work, partial = pending
    work.wait()
    return x + partial


def _through_norm(gradient: Tensor, pending: tuple[Any, Tensor], normed: Tensor, x: Tensor):
    work, arrived = pending
    work.wait()
    normed.backward(arrived)
    return gradient + x.grad


def forget() -> None:
    """Give back what compiled programs hold."""
    torch._dynamo.reset()
    gc.collect()

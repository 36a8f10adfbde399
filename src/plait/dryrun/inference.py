"""Answering with a large model: the time to the first token and of each further one, predicted.

The forward of a few layers is captured for the prompt and for a single token and priced like a
training step's pieces. A single token's reading of the cache is added in closed form: keys and
values of all tokens before it, once a layer.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.compiler.levels import passes_of
from plait.cost.clusters import Cluster
from plait.cost.operations import operation_s
from plait.cost.simulate import COMPUTE, Operation, communication, simulate
from plait.cost.topology import message, place
from plait.dryrun.model_source import decoder_source
from plait.dryrun.pieces import without_torch_warnings
from plait.dryrun.work import Work, num_bytes_of, work_of
from plait.errors import PlanError
from plait.graph.capture import capture
from plait.graph.graph import Role, call_of
from plait.models.decoder import Decoder
from plait.models.decoder_config import DecoderConfig
from plait.plan.parallel_plan import ParallelPlan

_BYTES = 2  # of a weight, an activation and an entry of the cache


@dataclass(frozen=True, kw_only=True)
class InferencePrice:
    """What answering costs.

    first_token_s: the prompt; per_token_s: each token after it, for all requests of the batch at
    once. weight_bytes and cache_bytes are those of one rank.
    """

    first_token_s: float
    per_token_s: float
    weight_bytes: int
    cache_bytes: int
    notes: tuple[str, ...] = (
        "closed form: reading the cache, at the bandwidth of memory",
        "the host is ahead of the device; a token less than its launches apart would need graphs",
    )


def price_inference(
    config: DecoderConfig,
    cluster: Cluster,
    *,
    tp: int = 1,
    prompt_tokens: int = 512,
    batch_size: int = 1,
    answer_tokens: int = 512,
) -> InferencePrice:
    """Price a prompt and an answer, with weights over tp ranks.

    Further tokens are priced in the middle of the answer. Raises PlanError where tp does not divide
    the model, and where weights and cache exceed the device's memory.
    """
    if tp > cluster.num_ranks:
        raise PlanError(f"tp={tp} needs as many ranks, {cluster.name} has {cluster.num_ranks}.")
    prompt = _Forward(config, cluster, tp, batch_size, prompt_tokens)
    token = _Forward(config, cluster, tp, batch_size, 1)
    held = prompt_tokens + answer_tokens
    seen = prompt_tokens + answer_tokens / 2
    cache_token_bytes = _cache_bytes(config, tp) * batch_size
    read_s = cache_token_bytes * seen / cluster.device.memory_bandwidth_bytes_per_s
    price = InferencePrice(
        first_token_s=prompt.total_s,
        per_token_s=token.total_s + read_s,
        weight_bytes=token.weight_bytes,
        cache_bytes=round(cache_token_bytes * held),
    )
    needed = price.weight_bytes + price.cache_bytes
    if needed > cluster.device.memory_bytes:
        raise PlanError(
            f"tp={tp} needs {needed / 2**30:.1f} GiB a rank ({price.weight_bytes / 2**30:.1f} "
            f"weights, {price.cache_bytes / 2**30:.1f} cache), {cluster.device.name} has "
            f"{cluster.device.memory_bytes / 2**30:.1f}. Choose a larger tp, or shorter answers."
        )
    return price


def _cache_bytes(config: DecoderConfig, tp: int) -> float:
    """Of one token, on one rank."""
    if config.latent is not None:
        return _BYTES * config.num_layers * (config.latent.rank + config.latent.rotary_size)
    return 2 * _BYTES * config.num_layers * config.num_kv_heads * config.head_size / tp


class _Forward:
    """One forward of the whole model, from one of each kind of its layers."""

    def __init__(
        self, config: DecoderConfig, cluster: Cluster, tp: int, batch: int, tokens: int
    ) -> None:
        self.cluster, self.tp = cluster, tp
        source = decoder_source(config)
        kinds = list(dict.fromkeys(source.kinds))
        layers = list(source.kind_layers) * (2 if len(kinds) == 1 else 1)
        vocab_size = -(-config.vocab_size // tp)
        with torch.device("meta"):
            tokens_BT = torch.empty((batch, tokens), dtype=torch.int64)
        plan = ParallelPlan(tp=tp)
        with torch.no_grad(), without_torch_warnings():
            graph = capture(source.make(layers, vocab_size), tokens_BT, plan, loss=_next_logits)
        for each in passes_of("O0", "fast", plan):
            graph = each(graph, plan, cluster)
        calls = [(node, called[0]) for node in graph.root.graph.nodes if (called := call_of(node))]
        if len(kinds) == 1:
            del calls[2]
        counts = [1, *(source.kinds.count(kind) for kind in kinds), 1]
        if len(calls) != len(counts):
            raise PlanError(
                f"{config.family} is captured as {len(calls)} pieces, not a layer each."
            )
        self.total_s = 0.0
        self.weight_bytes = 0
        for (node, name), count in zip(calls, counts, strict=True):
            template = graph.templates[name]
            self.total_s += count * self._piece_s(work_of(template.forward, "fused"))
            parameters = [
                x
                for x in node.args[2:]
                if x.op == "placeholder" and x.meta["val"].role is Role.PARAMETER
            ]
            self.weight_bytes += count * sum(_bytes_of(x) for x in parameters)

    def _piece_s(self, work: Sequence[Work]) -> float:
        where = place(self.cluster, "tp", size=self.tp)
        operations = []
        for each in work:
            if each.collective is not None:
                duration_s = message(each.collective, each.num_bytes, where).duration_s
                stream = communication(each.group)
            else:
                duration_s = 0.0 if each.is_wait else operation_s(each.cost, self.cluster.device)
                stream = COMPUTE
            operations.append(Operation(each.name, stream, duration_s, each.depends_on))
        return simulate(operations, range(len(operations))).total_s


def _bytes_of(node) -> int:
    return num_bytes_of(node) or node.meta["val"].num_bytes


def _next_logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.logits(model(tokens_BT)[:, -1:]).sum()

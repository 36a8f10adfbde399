"""The runs of `dryrun_accuracy --device cuda`: one rank of a large job each, its true program.

A recipe says everything. The schedule is that of the whole plan, captured on fake tensors; what the
rank holds is made of the schedule's own inputs, so nothing as large as all ranks together is ever
there. Of a model that is parted among pipeline stages, a rank has a few layers, between the
embedding and the loss.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import plait
from benchmarks.result import default_dtype
from plait.compiler.shard import shard_shape
from plait.cost.accelerators import find_cluster
from plait.dryrun.fused_attention import gpu_attention
from plait.graph.graph import Graph, Role, Value
from plait.graph.schedule import Schedule
from plait.models.decoder import Decoder
from plait.models.registry import FAMILIES
from plait.plan.parallel_plan import ParallelPlan

DeviceType = Literal["cpu", "cuda"]
_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3 1B": (
        "LlamaForCausalLM",
        {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3 3B": (
        "LlamaForCausalLM",
        {
            **_LLAMA_3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3 8B": (
        "LlamaForCausalLM",
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
        },
    ),
    "Llama-3 70B": (
        "LlamaForCausalLM",
        {
            **_LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
        },
    ),
    "Llama-3 405B": (
        "LlamaForCausalLM",
        {
            **_LLAMA_3,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_attention_heads": 128,
        },
    ),
    "Qwen3 8B": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
"""Published shapes; each recipe says how many of the layers a rank has."""


@dataclass(frozen=True, kw_only=True)
class RankRecipe:
    """One rank. layers: that it has. rows, tokens: of its batch, all micro-batches together."""

    model: str
    layers: int
    plan: ParallelPlan
    rows: int = 1
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    width: int = 0
    """Where it is not 0: a small model of this many heads instead, of size 16 (`cut_down`)."""

    @property
    def name(self) -> str:
        """All that it is, in words."""
        plain = ParallelPlan()
        parts = {
            name: getattr(self.plan, name)
            for name in ("dp", "fsdp", "tp", "sp", "replicas", "recompute", "split_backward")
            if getattr(self.plan, name) != getattr(plain, name)
        }
        words = [self.model, f"{self.layers} layers"]
        words += [f"{name} {size}" if size is not True else name for name, size in parts.items()]
        words.append(f"{self.rows} x {self.tokens}")
        if self.plan.num_micro_batches > 1:
            words.append(f"{self.plan.num_micro_batches} micro-batches")
        words += ["float32"] if self.dtype is torch.float32 else []
        words += [self.optimizer] if self.optimizer != "adamw" else []
        return ", ".join(words)

    @property
    def vocabulary(self) -> int:
        """Number of tokens there are."""
        return 1024 if self.width else MODELS[self.model][1]["vocab_size"]


def _rank(model: str, layers: int, *, rows: int = 1, tokens: int = 8192, **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("dtype", "optimizer") if name in settings}
    plan = ParallelPlan(**settings)
    return RankRecipe(model=model, layers=layers, plan=plan, rows=rows, tokens=tokens, **own)


RANKS: tuple[RankRecipe, ...] = (
    _rank("Llama-3 8B", 32, tp=8),
    _rank("Llama-3 8B", 32, tp=8, sp=True, rows=2),
    _rank("Llama-3 8B", 32, tp=8, rows=4, recompute="full"),
    _rank("Llama-3 8B", 32, tp=8, rows=2, recompute="selective"),
    _rank("Llama-3 8B", 32, tp=8, rows=4, num_micro_batches=4),
    _rank("Llama-3 8B", 32, tp=8, rows=2, replicas=2),
    _rank("Llama-3 8B", 32, tp=8, rows=4, replicas=2, recompute="full"),
    _rank("Llama-3 8B", 32, tp=4, tokens=4096),
    _rank("Llama-3 8B", 32, tp=8, tokens=32768, recompute="full"),
    _rank("Llama-3 8B", 32, tp=8, tokens=4096, dtype=torch.float32),
    _rank("Llama-3 8B", 32, tp=8, split_backward=True),
    _rank("Llama-3 8B", 32, tp=8, dp=16),
    _rank("Llama-3 8B", 32, fsdp=64, tokens=4096, recompute="full"),
    _rank("Llama-3 8B", 32, fsdp=64, rows=2, tokens=4096, num_micro_batches=2, recompute="full"),
    _rank("Llama-3 8B", 32, fsdp=8, tp=8),
    _rank("Llama-3 70B", 10, tp=8),
    _rank("Llama-3 70B", 10, tp=8, rows=4, recompute="full"),
    _rank("Llama-3 70B", 20, tp=8, recompute="selective"),
    _rank("Llama-3 70B", 5, tp=8, rows=4, num_micro_batches=4, replicas=2),
    _rank("Llama-3 405B", 4, tp=8, tokens=4096),
    _rank("Llama-3 405B", 3, tp=8, sp=True, recompute="full"),
    _rank("Llama-3 3B", 28, tokens=4096, recompute="full"),
    _rank("Llama-3 1B", 16, rows=4, tokens=2048),
    _rank("Llama-3 1B", 16, dp=64, rows=4, tokens=2048, optimizer="sgd"),
    _rank("Qwen3 8B", 36, tp=8, tokens=4096, rows=2),
)


def cut_down(recipe: RankRecipe) -> RankRecipe:
    """The same plan for a model so small that a CPU runs it at once."""
    parts = recipe.plan.tp * (4 if recipe.plan.replicas != 1 else 1)
    return replace(recipe, layers=2, tokens=max(32, 4 * parts), width=max(8, recipe.plan.tp))


def make_schedule(recipe: RankRecipe, device: DeviceType, cluster: str) -> Schedule:
    """Capture the rank's step on fake tensors, and compile it for its place in the cluster.

    On a CPU attention is one operator, as on a GPU: which kernels this CPU has does not matter.
    """
    with FakeTensorMode(), torch.device(device), default_dtype(recipe.dtype):
        model = Decoder(_config(recipe))
        tokens_BT = torch.empty((recipe.rows, recipe.tokens), dtype=torch.int64)
    with gpu_attention() if device == "cpu" else nullcontext():
        graph = plait.capture(model, tokens_BT, recipe.plan, loss=_loss)
    with FakeTensorMode():
        held = RankWeights(graph, recipe.plan, device)
    return plait.compile(
        graph,
        recipe.plan,
        cluster=find_cluster(cluster, recipe.plan.num_ranks),
        optimizer=make_optimizer(recipe, held),
    )


class RankWeights(nn.Module):
    """What a rank holds of a model, under the model's names: parameters and buffers, no forward.

    Their values are random, and as large as at the start of a training.
    """

    def __init__(self, program: Graph | Schedule, plan: ParallelPlan, device: str) -> None:
        """Make all that the program reads, in its order."""
        super().__init__()
        for value in program.inputs:
            if value.role in (Role.PARAMETER, Role.BUFFER):
                self._add(value, plan.fsdp, device)

    def _add(self, value: Value, fsdp: int, device: str) -> None:
        *path, name = value.name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if value.role is Role.BUFFER:
            owner.register_buffer(name, torch.zeros(value.shape, dtype=value.dtype, device=device))
            return
        shape = shard_shape(value.shape, fsdp) if fsdp > 1 else value.shape
        x = torch.empty(shape, dtype=value.dtype, device=device).normal_(std=0.02)
        owner.register_parameter(name, nn.Parameter(x))


def make_optimizer(recipe: RankRecipe, held: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of what a rank holds."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(held.named_parameters(), lr=0.01, momentum=0.9)
    return torch.optim.AdamW(held.named_parameters(), lr=1e-4, fused=True)


def make_tokens(recipe: RankRecipe, device: str) -> Tensor:
    """One batch of the rank."""
    return torch.randint(0, recipe.vocabulary, (recipe.rows, recipe.tokens), device=device)


def _config(recipe: RankRecipe) -> Any:
    architecture, settings = MODELS[recipe.model]
    if recipe.width:
        settings = settings | {
            "hidden_size": 16 * recipe.width,
            "intermediate_size": 32 * recipe.width,
            "num_attention_heads": recipe.width,
            "num_key_value_heads": recipe.width,
            "head_dim": 16,
        }
    return FAMILIES[architecture].read_config(
        {
            "architectures": [architecture],
            **settings,
            "vocab_size": recipe.vocabulary,
            "num_hidden_layers": recipe.layers,
            "max_position_embeddings": recipe.tokens,
        }
    )


def _loss(model: Any, tokens_BT: Tensor) -> Tensor:
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()

"""The runs of `dryrun_accuracy`: what is built and stepped, for the truth and for the prediction.

A recipe says everything. `build` makes the model, its optimizer and its step, with real tensors in
a process of its own, or with fake ones where it is predicted.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import plait
from benchmarks.dryrun_pipeline import Logits, Order, keep_stage, pipeline_step
from benchmarks.result import default_dtype
from plait.dryrun.eager import EagerProgram
from plait.executor.ranks import shard_parameters
from plait.graph.parallelize import parallelize
from plait.graph.schedule import Schedule
from plait.models.decoder import Decoder
from plait.models.registry import FAMILIES

Way = Literal["schedule", "eager"]
WIDTH = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
COMMON = {**WIDTH, **HEADS, "vocab_size": 2048}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**COMMON, "rms_norm_eps": 1e-5}),
    "llama-tied": ("LlamaForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**COMMON, "head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "mixtral": (
        "MixtralForCausalLM",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**COMMON, "head_dim": 32}),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. way: a compiled schedule, or eager PyTorch. changes: of the architecture's settings.

    ranks: processes. parallel: "tp", "fsdp" or "pp" over them; eager tp is DTensor's, eager fsdp is
    FSDP2's; pp is eager only, PyTorch's pipelining in the `order`. recompute: of the plan; eager
    "full" checkpoints each layer. level: of the schedule.
    """

    name: str
    way: Way = "schedule"
    model: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    tokens: int = 128
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    level: str = "O0"
    micro_batches: int = 1
    optimizer: str = "adamw"
    parallel: str = ""
    order: Order = "GPipe"
    hugging_face: bool = False

    @property
    def ranks(self) -> int:
        """Processes that run it."""
        return 2 if self.parallel else 1

    @property
    def unlike_ranks(self) -> range:
        """Ranks whose memory is compared: rank 0 alone where the others are like it."""
        return range(self.ranks if self.parallel == "pp" else 1)

    @property
    def plan(self) -> plait.ParallelPlan:
        """As the schedule is compiled for."""
        return plait.ParallelPlan(
            num_micro_batches=self.micro_batches,
            recompute=self.recompute,
            **({self.parallel: self.ranks} if self.parallel else {}),
        )


def _pipeline(name: str, *, batch: int = 8, **settings: Any) -> Recipe:
    return Recipe(name=name, way="eager", parallel="pp", micro_batches=4, batch=batch, **settings)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="llama float32"),
        Recipe(name="llama bfloat16", dtype=torch.bfloat16),
        Recipe(name="llama wide", changes={"hidden_size": 384, "intermediate_size": 1024}),
        Recipe(name="llama deep", changes={"num_hidden_layers": 10}, batch=2),
        Recipe(name="llama long", tokens=512, batch=2),
        Recipe(name="llama full recompute", recompute="full", batch=8),
        Recipe(name="llama selective recompute", recompute="selective", batch=8),
        Recipe(name="llama 2 micro-batches", micro_batches=2, batch=8),
        Recipe(name="llama 4 micro-batches, recompute", micro_batches=4, batch=8, recompute="full"),
        Recipe(name="llama tied, sgd", model="llama-tied", optimizer="sgd"),
        Recipe(name="qwen3 bfloat16", model="qwen3", dtype=torch.bfloat16, batch=6),
        Recipe(name="gpt2", model="gpt2"),
        Recipe(name="mixtral", model="mixtral"),
        Recipe(name="gemma2", model="gemma2", optimizer="sgd"),
        Recipe(name="olmo2 recompute", model="olmo2", recompute="full"),
        Recipe(name="llama O1", level="O1"),
        Recipe(name="llama O1, recompute", level="O1", recompute="full", batch=8),
        Recipe(name="gpt2 O1", level="O1", model="gpt2"),
        Recipe(name="transformers llama", hugging_face=True),
        Recipe(name="transformers gpt2", model="gpt2", hugging_face=True, changes=NO_DROPOUT),
        Recipe(name="llama tp", parallel="tp"),
        Recipe(name="llama tp, recompute", parallel="tp", recompute="full", batch=8),
        Recipe(name="llama fsdp", parallel="fsdp"),
        Recipe(name="llama fsdp, 2 micro-batches", parallel="fsdp", micro_batches=2),
        Recipe(name="eager llama", way="eager"),
        Recipe(name="eager transformers llama", way="eager", hugging_face=True),
        Recipe(name="eager llama checkpointed", way="eager", recompute="full", batch=8),
        Recipe(name="FSDP2 llama", way="eager", parallel="fsdp"),
        Recipe(name="FSDP2 llama bfloat16", way="eager", parallel="fsdp", dtype=torch.bfloat16),
        Recipe(name="FSDP2 llama wide", way="eager", parallel="fsdp", changes={"hidden_size": 256}),
        Recipe(name="FSDP2 checkpointed", way="eager", parallel="fsdp", recompute="full", batch=8),
        Recipe(name="FSDP2 2 micro-batches", way="eager", parallel="fsdp", micro_batches=2),
        Recipe(
            name="FSDP2 qwen3 sgd", way="eager", parallel="fsdp", model="qwen3", optimizer="sgd"
        ),
        Recipe(name="FSDP2 transformers", way="eager", parallel="fsdp", hugging_face=True),
        Recipe(name="FSDP2 gpt2", way="eager", parallel="fsdp", model="gpt2"),
        Recipe(name="DTensor llama", way="eager", parallel="tp"),
        Recipe(name="DTensor transformers", way="eager", parallel="tp", hugging_face=True),
        Recipe(name="DTensor qwen3", way="eager", parallel="tp", model="qwen3"),
        Recipe(name="DTensor checkpointed", way="eager", parallel="tp", recompute="full", batch=8),
        _pipeline("GPipe llama"),
        _pipeline("GPipe checkpointed", recompute="full", batch=16),
        _pipeline("GPipe transformers", hugging_face=True),
        _pipeline("1F1B llama", order="1F1B"),
        _pipeline("1F1B bfloat16", order="1F1B", dtype=torch.bfloat16, batch=16),
        _pipeline("1F1B transformers sgd", order="1F1B", hugging_face=True, optimizer="sgd"),
    )
}


def make_model(recipe: Recipe) -> nn.Module:
    """The model, with the weights that a training begins with, where the context says."""
    architecture, settings = ARCHITECTURES[recipe.model]
    settings = {**settings, **recipe.changes}
    if not recipe.hugging_face:
        family = FAMILIES[architecture]
        config = family.read_config({"architectures": [architecture], **_complete(settings)})
        with default_dtype(recipe.dtype):
            decoder = Decoder(config)
        decoder.initialize()
        return decoder
    import transformers  # no recipe of Plait's own models needs it

    config_class = getattr(transformers, architecture).config_class
    settings = {**settings, "vocab_size": 2048, "use_cache": False}
    config = config_class(**settings, bos_token_id=1, eos_token_id=2)
    with default_dtype(recipe.dtype):
        return transformers.AutoModelForCausalLM.from_config(config)


def loss_of(recipe: Recipe) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss of a step, a mean over all tokens."""
    if recipe.hugging_face:
        return _hugging_face_loss
    return _decoder_loss


def make_tokens(recipe: Recipe) -> Tensor:
    """One batch."""
    return torch.randint(0, 2048, (recipe.batch, recipe.tokens))


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer; none where a schedule's parameters are DTensors, which it cannot trace yet."""
    if recipe.way == "schedule" and recipe.parallel == "tp":
        return None
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(named, lr=0.01, momentum=0.9)
    fused = recipe.way == "schedule"
    return torch.optim.AdamW(named, lr=1e-4, fused=fused or None)


def make_schedule(recipe: Recipe, device: str = "meta") -> Schedule:
    """Capture and compile. device: of the tensors; a GPU's kernels are asked for on that GPU."""
    with torch.device(device):
        model, tokens_BT = make_model(recipe), make_tokens(recipe)
    captured = plait.ParallelPlan(
        num_micro_batches=recipe.micro_batches,
        recompute=recipe.recompute,
        tp=recipe.plan.tp,
    )
    graph = plait.capture(model, tokens_BT, captured, loss=loss_of(recipe))
    if recipe.parallel == "fsdp":
        with plait_mesh(recipe) as mesh:
            shard_parameters(model, mesh)
    return plait.compile(
        graph, recipe.plan, level=recipe.level, optimizer=make_optimizer(recipe, model)
    )


def make_placed_model(recipe: Recipe, mesh: DeviceMesh | None) -> nn.Module:
    """What a rank holds of the model that a schedule runs on; ranks agree on the weights."""
    torch.manual_seed(0)
    model = make_model(recipe)
    if recipe.parallel == "tp":
        assert mesh is not None
        parallelize(model, recipe.plan, mesh)
    elif recipe.parallel == "fsdp":
        assert mesh is not None
        shard_parameters(model, mesh)
    return model


def build_scheduled(recipe: Recipe, schedule: Schedule, mesh: DeviceMesh | None) -> EagerProgram:
    """A real model, and a step of the schedule on it."""
    model, tokens_BT = make_placed_model(recipe, mesh), make_tokens(recipe)
    optimizer = make_optimizer(recipe, model)

    def step() -> None:
        plait.run(schedule, model, tokens_BT, optimizer=optimizer, mesh=mesh)
        if optimizer is None:
            model.zero_grad()

    return EagerProgram(step, model, optimizer)


def build_eager(recipe: Recipe, mesh: DeviceMesh | None) -> EagerProgram:
    """A model, and a step of eager PyTorch on it; on fake tensors inside a fake mode."""
    model, tokens_BT = make_model(recipe), make_tokens(recipe)
    trunk: Any = model.model if recipe.hugging_face else model
    layers = trunk.layers
    if recipe.parallel == "pp":
        assert mesh is not None
        group = mesh.get_group("pp")
        layers = keep_stage(model, trunk, group.rank(), group.size())
    if recipe.recompute == "full":
        for layer in layers:
            layer.forward = _checkpointed(layer.forward)
    if recipe.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        assert mesh is not None
        for layer in layers:
            fully_shard(layer, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
    elif recipe.parallel == "tp":
        assert mesh is not None
        parallelize(model, recipe.plan, mesh)
    optimizer = make_optimizer(recipe, model)
    loss = loss_of(recipe)

    def forward_and_backward() -> None:
        for part in tokens_BT.chunk(recipe.micro_batches):
            (loss(model, part) / recipe.micro_batches).backward()

    if recipe.parallel == "pp":
        assert mesh is not None
        forward_and_backward = _pipelined(recipe, mesh, model, tokens_BT)

    def step() -> None:
        forward_and_backward()
        assert optimizer is not None
        optimizer.step()
        optimizer.zero_grad()

    return EagerProgram(step, model, optimizer)


@contextlib.contextmanager
def plait_mesh(recipe: Recipe, *, rank: int = 0) -> Iterator[DeviceMesh]:
    """The mesh of the recipe's plan, in a group of processes, or that of `rank` without one."""
    from plait.graph.plan_mesh import plan_mesh

    with plan_mesh(recipe.plan, rank=rank) as mesh:
        yield mesh


def _pipelined(
    recipe: Recipe, mesh: DeviceMesh, model: nn.Module, tokens_BT: Tensor
) -> Callable[[], None]:
    return pipeline_step(
        Logits(model) if recipe.hugging_face else model,
        mesh.get_group("pp"),
        tokens_BT,
        order=recipe.order,
        num_micro_batches=recipe.micro_batches,
        width={**COMMON, **recipe.changes}["hidden_size"],
        dtype=recipe.dtype,
        loss=_logits_loss if recipe.hugging_face else partial(_hidden_loss, model),
    )


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    return {"vocab_size": 2048, **settings}


def _decoder_loss(model: Any, tokens_BT: Tensor) -> Tensor:
    return _hidden_loss(model, model(tokens_BT), tokens_BT)


def _hugging_face_loss(model: Any, tokens_BT: Tensor) -> Tensor:
    return _logits_loss(model(tokens_BT).logits, tokens_BT)


def _hidden_loss(model: Any, hidden_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    return model.loss(hidden_BTD, tokens_BT) / tokens_BT.numel()


def _logits_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT.flatten())

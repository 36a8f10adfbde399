"""Models for replicas, and one step of them: split and unsplit, all ranks in one process."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

import plait
from plait.compiler.merge import merge
from plait.compiler.separate import separate
from plait.graph.parallelize import parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.schedule import Schedule
from plait.models.decoder import Decoder, DecoderConfig
from tests.graph.spread_models import OWN_FAMILIES, hugging_face, loss

STRICT = {
    "our_llama": {},
    "our_qwen3": {"family": "qwen3", "qk_norm": True},
}
"""Our models that are strict themselves; of others, the compiler makes the graph strict."""
OWN = {
    **STRICT,
    "our_gemma2": {**OWN_FAMILIES["gemma2"], "sliding_window": 48},
    "our_mixtral": OWN_FAMILIES["mixtral"],
}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 48}),
    "gpt2": ("GPT2", {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    "gpt2_dropout": ("GPT2", {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "gemma2": ("Gemma2", {"sliding_window": 48}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
NAMES = (*OWN, *FAMILIES)


@dataclass(frozen=True)
class Case:
    """A model and a way to run it. batch 1 is split along tokens, a larger one by its samples."""

    name: str
    tp: int = 2
    sp: bool = False
    replicas: int | tuple[int, ...] = 2
    batch: int = 1
    num_tokens: int = 128
    width: int = 64
    dtype: torch.dtype = torch.float32
    threads: int = 1
    numerics: str = "strict"
    causal_split: bool = False

    def __str__(self) -> str:
        """As in llama-tp2-sp-r2-b1-s128-w64-float32-t1."""
        sp, kind = "-sp" * self.sp, str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-tp{self.tp}{sp}-r{self.replicas}-b{self.batch}-s{self.num_tokens}"
            f"-w{self.width}-{kind}-t{self.threads}"
            + "-fast" * (self.numerics == "fast")
            + "-causal" * self.causal_split
        )

    def model(self) -> nn.Module:
        inner, head = 3 * self.width // 2, max(self.width // 8, 16)
        if self.name in OWN:
            torch.manual_seed(0)
            config = DecoderConfig(
                vocab_size=96,
                hidden_size=self.width,
                intermediate_size=inner,
                num_layers=2,
                num_heads=8,
                num_kv_heads=4,
                head_size=head,
                max_positions=4 * self.num_tokens,
                numerics=self.numerics if self.name in STRICT else "fast",
                **OWN[self.name],
            )
            model = Decoder(config)
        else:
            family, settings = FAMILIES[self.name]
            if family in ("Llama", "Qwen3", "Mistral", "Gemma2"):
                settings = {**settings, "head_dim": head}
            model = hugging_face(
                family,
                hidden_size=self.width,
                intermediate_size=inner,
                max_position_embeddings=4 * self.num_tokens,
                **settings,
            )
        return model.to(self.dtype)

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 96, (self.batch, self.num_tokens), generator=generator)

    def plan(self) -> plait.ParallelPlan:
        return plait.ParallelPlan(
            tp=self.tp, sp=self.sp, replicas=self.replicas, causal_split=self.causal_split
        )


def schedules(case: Case) -> tuple[Schedule, Schedule]:
    """The step in replicas, and the same graph unsplit."""
    graph = plait.capture(case.model(), case.tokens(), case.plan(), loss=loss)
    split = plait.compile(graph, case.plan(), numerics=case.numerics)
    whole = plait.compile(merge(separate(graph)), plait.ParallelPlan(), numerics=case.numerics)
    return split, whole


@torch.no_grad()
def ranks_of(x: Tensor) -> list[Tensor]:
    x = getattr(x, "_local_tensor", x)
    x = x.wait() if hasattr(x, "wait") else x
    return list(x._local_tensors.values()) if isinstance(x, LocalTensor) else [x]


def both(case: Case) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], Schedule]:
    """Loss and every gradient, of each rank, split and unsplit."""
    split, whole = schedules(case)
    found = []
    model = case.model()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with plan_mesh(plait.ParallelPlan(tp=case.tp)) as mesh, LocalTensorMode(case.tp) as mode:
            parallelize(model, case.plan(), mesh)
            tokens = mode.rank_map(lambda _: case.tokens())
            for schedule in (split, whole):
                model.zero_grad()
                torch.manual_seed(2)
                value = plait.run(schedule, model, tokens, mesh=mesh)
                values = {"loss": ranks_of(value)}
                for name, p in model.named_parameters():
                    assert p.grad is not None, name
                    values[name] = [x.clone() for x in ranks_of(p.grad)]
                found.append(values)
    finally:
        torch.set_num_threads(threads)
    return found[0], found[1], split


@dataclass(frozen=True)
class Difference:
    """Values of one rank's tensor that differ, and by how much of the largest."""

    name: str
    rank: int
    count: int
    num_values: int
    relative: float


def differing(
    found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]
) -> list[Difference]:
    result = []
    for name, ranks in expected.items():
        for rank, (x, y) in enumerate(zip(found[name], ranks, strict=True)):
            count = int((x != y).sum())
            if count:
                relative = ((x - y).abs().max() / y.abs().max()).item()
                result.append(Difference(name, rank, count, x.numel(), relative))
    return result

"""A mixture of experts in place of a feed-forward layer: a router, its experts, shared experts.

Nothing here has a shape that depends on the data: tokens are sorted by expert, and the ends of the
groups stay a tensor.
"""

# Shapes: M tokens, D model width, I expert width, E experts, k experts of a token, R = M * k rows.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.errors import ModelError
from plait.nn.feed_forward import FeedForward
from plait.ops.grouped_linear import grouped_linear


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """Shape of a mixture of experts and the rule by which tokens choose.

    router: "softmax" over all experts, or "sigmoid" of each with a learnt bias that counts for
    the choice only [DeepSeek-V3, arXiv:2412.19437, section 2.1.2].
    normalize: let the weights of a token's experts add up to 1. scale: a factor on them.
    num_groups, groups_per_token: experts outside a token's best groups are not chosen; a group is
    worth its best expert (softmax) or its two best (sigmoid).
    router_float32: compute the scores in float32 whatever the model's dtype.
    shared_intermediate_size: width of the experts that see every token, 0 = none.
    dense_layers: numbers of the layers that have a plain feed-forward layer instead.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    router_float32: bool = False
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check what would otherwise fail deep inside."""
        if min(self.num_experts, self.intermediate_size, self.num_groups) < 1:
            raise ModelError(
                "num_experts, their intermediate_size and num_groups must be positive."
            )
        if self.num_experts % self.num_groups:
            raise ModelError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}."
            )
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ModelError(
                f"groups_per_token={self.groups_per_token} must lie in 1..{self.num_groups}."
            )
        room = self.num_experts // self.num_groups * self.groups_per_token
        if not 1 <= self.experts_per_token <= room:
            raise ModelError(f"experts_per_token={self.experts_per_token} must lie in 1..{room}.")
        if self.router == "sigmoid" and self.num_experts // self.num_groups < 2:
            raise ModelError("a sigmoid router needs groups of at least two experts.")


class Router(nn.Module):
    """Choose the experts of each token and their weights."""

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, settings: ExpertSettings) -> None:
        """Make the weight (E, D) and, for "sigmoid", the bias of the choice (E,), a buffer."""
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        if settings.router == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(settings.num_experts))

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (M, k) in the dtype of the scores, and numbers of experts (M, k)."""
        settings = self.settings
        weight_ED = self.weight
        if settings.router_float32:
            x_MD, weight_ED = x_MD.float(), weight_ED.float()
        scores_ME = functional.linear(x_MD, weight_ED)
        dtype = scores_ME.dtype
        if settings.router == "softmax":
            scores_ME = scores_ME.float().softmax(dim=-1)
            merit_ME = scores_ME
        else:
            scores_ME = scores_ME.float().sigmoid()
            merit_ME = scores_ME + self.e_score_correction_bias
        chosen_Mk = self._best_groups(merit_ME).topk(settings.experts_per_token, dim=-1).indices
        weights_Mk = scores_ME.gather(1, chosen_Mk)
        if settings.normalize:
            weights_Mk = weights_Mk / (weights_Mk.sum(dim=-1, keepdim=True) + 1e-20)
        return (weights_Mk * settings.scale).to(dtype), chosen_Mk

    def _best_groups(self, merit_ME: Tensor) -> Tensor:
        """Take experts outside the best groups out of the choice."""
        settings = self.settings
        if settings.groups_per_token == settings.num_groups:
            return merit_ME
        merit_MGe = merit_ME.unflatten(-1, (settings.num_groups, -1))
        num_best = 1 if settings.router == "softmax" else 2
        worth_MG = merit_MGe.topk(num_best, dim=-1).values.sum(dim=-1)
        best_Mg = worth_MG.topk(settings.groups_per_token, dim=-1).indices
        is_out_MG = torch.ones_like(worth_MG, dtype=torch.bool).scatter(1, best_Mg, False)
        return merit_MGe.masked_fill(is_out_MG[..., None], float("-inf")).flatten(1)


class ExpertWeights(nn.Module):
    """The matrices of all experts of a layer, stacked along a first dim."""

    def __init__(self, hidden_size: int, settings: ExpertSettings) -> None:
        """Make the three stacks; `Decoder.initialize` or a checkpoint gives them their values."""
        super().__init__()
        num, inner = settings.num_experts, settings.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num, inner, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num, inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, inner))
        for stack in self.parameters():
            nn.init.normal_(stack, std=stack.shape[-1] ** -0.5)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Map rows sorted by expert (R, D) to (R, D)."""
        gate_RI = functional.silu(grouped_linear(x_RD, self.gate_proj, ends_E))
        inner_RI = gate_RI * grouped_linear(x_RD, self.up_proj, ends_E)
        return grouped_linear(inner_RI, self.down_proj, ends_E)


class ExpertFeedForward(nn.Module):
    """The sum of a token's experts, each times its weight, and of the shared experts."""

    def __init__(self, hidden_size: int, settings: ExpertSettings) -> None:
        """Make router, experts and shared experts."""
        super().__init__()
        self.num_experts = settings.num_experts
        self.gate = Router(hidden_size, settings)
        self.experts = ExpertWeights(hidden_size, settings)
        self.shared_experts = None
        if settings.shared_intermediate_size:
            self.shared_experts = FeedForward(
                hidden_size, settings.shared_intermediate_size, bias=False
            )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_MD = x_BTD.flatten(0, -2)
        weights_Mk, chosen_Mk = self.gate(x_MD)
        num_each = chosen_Mk.shape[1]
        chosen_R = chosen_Mk.flatten()
        order_R = chosen_R.argsort(stable=True)
        numbers_E = torch.arange(self.num_experts, device=x_MD.device)
        ends_E = (chosen_R[:, None] == numbers_E).sum(dim=0).cumsum(dim=0)
        rows_RD = x_MD.index_select(0, order_R // num_each)
        outputs_RD = self.experts(rows_RD, ends_E)
        # Back in the order of the tokens, a token's experts stand side by side: their sum has one
        # order, whatever else is in the batch.
        outputs_MkD = outputs_RD.index_select(0, order_R.argsort()).unflatten(0, (-1, num_each))
        mixed_MD = (outputs_MkD * weights_Mk[..., None].to(outputs_MkD.dtype)).sum(dim=1)
        mixed_BTD = mixed_MD.view(x_BTD.shape)
        return mixed_BTD if self.shared_experts is None else mixed_BTD + self.shared_experts(x_BTD)

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
from plait.ops.expert_tokens import expert_order, gather_rows, mix_rows, route
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
        weights_Mk, chosen_Mk = route(
            scores_ME,
            settings.experts_per_token,
            bias_E=self.e_score_correction_bias if settings.router == "sigmoid" else None,
            normalize=settings.normalize,
            num_groups=settings.num_groups,
            groups_per_token=settings.groups_per_token,
        )
        return (weights_Mk * settings.scale).to(scores_ME.dtype), chosen_Mk


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
        order = expert_order(chosen_Mk, self.num_experts)
        outputs_RD = self.experts(gather_rows(x_MD, order), order.ends_E)
        mixed_MD = mix_rows(outputs_RD, weights_Mk, order)
        mixed_BTD = mixed_MD.view(x_BTD.shape)
        return mixed_BTD if self.shared_experts is None else mixed_BTD + self.shared_experts(x_BTD)

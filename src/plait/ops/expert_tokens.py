"""Mixture of experts around its products: who goes where, rows sorted by expert, and back.

`route` chooses experts, `expert_order` sorts, `gather_rows` and `mix_rows` carry rows there and
back, `grouped_linear` multiplies between them. No shape depends on the data. All kernels are
PyTorch's: gradients by index_add are no slower than gathers that need no atomic addition.
"""

# Shapes: M tokens, D model width, E experts, G groups of e experts, k experts of a token,
# R = M * k rows.

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.work import Work, num_bytes


@dataclass(frozen=True)
class ExpertOrder:
    """Rows sorted by expert.

    order_R: which of (token, choice) stands in a row. place_Mk: in which row a choice stands.
    ends_E: where the rows of each expert end.
    """

    order_R: Tensor
    place_Mk: Tensor
    ends_E: Tensor


def route(
    scores_ME: Tensor,
    num_chosen: int,
    *,
    bias_E: Tensor | None = None,
    normalize: bool = True,
    num_groups: int = 1,
    groups_per_token: int = 1,
) -> tuple[Tensor, Tensor]:
    """The best experts of each token: weights in float32, and their numbers, each (M, k).

    Weights are a softmax over all experts; with a bias, which counts for the choice only, sigmoids
    [DeepSeek-V3, arXiv:2412.19437, section 2.1.2]. normalize: let a token's add up to 1. Experts
    outside a token's best groups are not chosen; a group is worth its best expert (softmax) or its
    two best (sigmoid). Raises ModelError where that leaves too few.
    """
    if scores_ME.dim() != 2 or scores_ME.shape[1] % num_groups:
        raise ModelError(
            f"route needs scores (tokens, experts), the experts in {num_groups} equal groups, "
            f"got {tuple(scores_ME.shape)}."
        )
    room = scores_ME.shape[1] // num_groups * groups_per_token
    if not 1 <= num_chosen <= room or groups_per_token > num_groups:
        raise ModelError(
            f"route has {room} experts to choose from in {groups_per_token} of {num_groups} "
            f"groups, got num_chosen={num_chosen}."
        )
    if bias_E is None:
        scores_ME = scores_ME.float().softmax(dim=-1)
        merit_ME = scores_ME
    else:
        scores_ME = scores_ME.float().sigmoid()
        merit_ME = scores_ME + bias_E
    if groups_per_token < num_groups:
        merit_ME = _in_best_groups(merit_ME, num_groups, groups_per_token, bias_E is not None)
    chosen_Mk = merit_ME.topk(num_chosen, dim=-1).indices
    weights_Mk = scores_ME.gather(1, chosen_Mk)
    if normalize:
        weights_Mk = weights_Mk / (weights_Mk.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_Mk, chosen_Mk


def expert_order(chosen_Mk: Tensor, num_experts: int) -> ExpertOrder:
    """Sort (token, choice) by expert; within an expert the order of the tokens stays."""
    chosen_R = chosen_Mk.flatten()
    order_R = chosen_R.argsort(stable=True)
    numbers_E = torch.arange(num_experts, device=chosen_R.device)
    ends_E = (chosen_R[:, None] == numbers_E).sum(dim=0).cumsum(dim=0)
    return ExpertOrder(order_R, order_R.argsort().view(chosen_Mk.shape), ends_E)


def gather_rows(x_MD: Tensor, order: ExpertOrder) -> Tensor:
    """Each token's row once for each of its experts, sorted by expert: (R, D)."""
    num_tokens, num_each = order.place_Mk.shape
    if x_MD.dim() != 2 or x_MD.shape[0] != num_tokens:
        raise ModelError(
            f"gather_rows needs a row for each of {num_tokens} tokens, got {tuple(x_MD.shape)}."
        )
    return x_MD.index_select(0, order.order_R // num_each)


def mix_rows(rows_RD: Tensor, weights_Mk: Tensor, order: ExpertOrder) -> Tensor:
    """The sum of a token's rows, each times its weight: (M, D) in the dtype of the rows.

    A token's rows are added in the order of its choices, whatever else is in the batch.
    """
    if rows_RD.dim() != 2 or rows_RD.shape[0] != weights_Mk.numel():
        raise ModelError(
            f"mix_rows needs a row for each of {tuple(weights_Mk.shape)} weights, "
            f"got {tuple(rows_RD.shape)}."
        )
    rows_MkD = rows_RD.index_select(0, order.place_Mk.flatten()).unflatten(0, weights_Mk.shape)
    return (rows_MkD * weights_Mk[..., None].to(rows_MkD.dtype)).sum(dim=1)


def reference_gather_rows(x_MD: Tensor, chosen_Mk: Tensor) -> Tensor:
    """Walk through the experts."""
    num_experts = int(chosen_Mk.max()) + 1
    return torch.cat([x_MD[(chosen_Mk == e).any(dim=1)] for e in range(num_experts)])


def expert_tokens_work(rows_RD: Tensor, x_MD: Tensor) -> tuple[Work, Work]:
    """Of gathering and mixing, forward and backward: rows written once and read once each time."""
    bytes_each = 2 * (num_bytes(rows_RD) + num_bytes(x_MD))
    return (
        Work(flops=2 * rows_RD.numel(), bytes=bytes_each),
        Work(flops=4 * rows_RD.numel(), bytes=bytes_each + num_bytes(rows_RD)),
    )


def _in_best_groups(merit_ME: Tensor, num_groups: int, num_best: int, by_two: bool) -> Tensor:
    """Take experts outside the best groups out of the choice."""
    merit_MGe = merit_ME.unflatten(-1, (num_groups, -1))
    worth_MG = merit_MGe.topk(2 if by_two else 1, dim=-1).values.sum(dim=-1)
    best_Mg = worth_MG.topk(num_best, dim=-1).indices
    is_out_MG = torch.ones_like(worth_MG, dtype=torch.bool).scatter(1, best_Mg, False)
    return merit_MGe.masked_fill(is_out_MG[..., None], float("-inf")).flatten(1)

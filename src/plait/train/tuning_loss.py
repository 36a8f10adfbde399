"""What fine-tuning minimizes: the losses of packed batches."""

# Shapes: B rows, T tokens, M all of them, m the learnt ones, D model width, P pairs; rows 2p and
# 2p + 1 are chosen and rejected.

import torch
from torch import Tensor
from torch.nn import functional

from plait.models.decoder import Decoder
from plait.train.packing import Batch
from plait.train.step import Hidden


def batch_loss(model: Decoder, hidden: Hidden, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Sum the losses of the learnt tokens [nats]. hidden: of the model, by `hidden_of`."""
    hidden_BTD = hidden(batch.inputs, batch.layout)
    return _loss_of_learnt(model, hidden_BTD, batch.targets, dtype=dtype)


def answer_logps(model: Decoder, hidden: Hidden, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Log-probability of the learnt tokens of each row, (B,) [nats]."""
    rows = zip(hidden(batch.inputs, batch.layout), batch.targets, strict=True)
    return torch.stack([-_loss_of_learnt(model, *row, dtype=dtype) for row in rows])


def _loss_of_learnt(
    model: Decoder, hidden: Tensor, targets: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Sum the losses; questions, often most of a conversation, never reach the output head."""
    targets_M = targets.flatten()
    places_m = (targets_M >= 0).nonzero()[:, 0]
    hidden_mD = hidden.flatten(0, -2).index_select(0, places_m)
    return model.loss(hidden_mD, targets_M[places_m], dtype=dtype)


def preference_loss(logps_B: Tensor, reference_B: Tensor, *, beta: float) -> tuple[Tensor, float]:
    """Sum the losses of all pairs, and say in how many the chosen answer wins.

    -log sigmoid(beta * (gain of the chosen - gain of the rejected)), a gain being the
    log-probability above that of the reference [Rafailov et al. 2023, eq. 7].
    """
    gains_P2 = (logps_B - reference_B).view(-1, 2)
    margins_P = beta * (gains_P2[:, 0] - gains_P2[:, 1])
    return -functional.logsigmoid(margins_P).sum(), float((margins_P > 0).sum())

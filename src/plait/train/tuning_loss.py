"""What fine-tuning minimizes: the losses of packed batches."""

# Shapes: B rows, T tokens, D model width, P pairs; rows 2p and 2p + 1 are chosen and rejected.

import torch
from torch import Tensor
from torch.nn import functional

from plait.models.decoder import Decoder
from plait.train.packing import Batch
from plait.train.step import autocast, summed_loss


def batch_loss(model: Decoder, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Sum the losses of the learnt tokens [nats]."""
    return summed_loss(model, batch.inputs, batch.targets, dtype=dtype, layout=batch.layout)


def answer_logps(model: Decoder, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Log-probability of the learnt tokens of each row, (B,) [nats]."""
    with autocast(batch.inputs.device.type, dtype):
        hidden_BTD = model(batch.inputs, batch.layout)
    rows = zip(hidden_BTD, batch.targets, strict=True)
    return torch.stack([-model.loss(hidden, targets, dtype=dtype) for hidden, targets in rows])


def preference_loss(logps_B: Tensor, reference_B: Tensor, *, beta: float) -> tuple[Tensor, float]:
    """Sum the losses of all pairs, and say in how many the chosen answer wins.

    -log sigmoid(beta * (gain of the chosen - gain of the rejected)), a gain being the
    log-probability above that of the reference [Rafailov et al. 2023, eq. 7].
    """
    gains_P2 = (logps_B - reference_B).view(-1, 2)
    margins_P = beta * (gains_P2[:, 0] - gains_P2[:, 1])
    return -functional.logsigmoid(margins_P).sum(), float((margins_P > 0).sum())

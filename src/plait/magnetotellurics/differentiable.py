"""The 2-D forward problem as a torch operation, so that any network or optimizer can use it."""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from plait.errors import EarthError
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.jacobian import Linearization
from plait.magnetotellurics.observations import Observations


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log10_rho: torch.Tensor,
        problem: Problem,
        observations: Observations,
        num_workers: int,
    ) -> torch.Tensor:
        resistivity = 10.0 ** log10_rho.detach().numpy()
        ctx.linearization = Linearization(
            problem, resistivity, observations, num_workers=num_workers
        )
        return torch.from_numpy(ctx.linearization.values.copy())

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a silent zero
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator's signature)
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        gradient = ctx.linearization.transpose_times(np.asarray(grad_outputs[0]))
        return torch.from_numpy(gradient), None, None, None


def forward_model(
    log10_rho: torch.Tensor,
    *,
    problem: Problem,
    observations: Observations,
    num_workers: int = 1,
) -> torch.Tensor:
    """Predict the data from log10 resistivity; backward solves the adjoint once.

    Args:
        log10_rho: float64 on the CPU, mesh.ground_shape, log10 of ohm m.
        problem: made for the observations' frequencies and receivers.
        observations: which numbers to predict; their values are not used.
        num_workers: threads, over which modes and frequencies are spread.

    Returns:
        (n_data,) float64, in the units of Component.

    Raises:
        EarthError: a tensor that is not float64 on the CPU.
    """
    if log10_rho.dtype != torch.float64 or log10_rho.device.type != "cpu":
        raise EarthError(
            f"log10_rho is {log10_rho.dtype} on {log10_rho.device}; expected float64 on the CPU"
        )
    return _Forward.apply(log10_rho, problem, observations, num_workers)  # pyright: ignore[reportReturnType]

"""A variational autoencoder that has learnt a Prior: codes of a few numbers stand for sections.

The decoder has no batch statistics and smooth activations, since an inversion uses its Jacobian.
Codes of the prior are standard normal, so that |code|^2 is a negative log prior
[Kingma and Welling 2014]; the decoder's spread is learnt in closed form [Rybkin et al. 2021].
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.prior import Prior
from plait.magnetotellurics.prior_sampler import draw_sections

# Shapes: B sections, C cells of a section (rows times columns), L numbers of a code.


@dataclass(frozen=True, kw_only=True)
class CodeGrid:
    """The cells that one code stands for: all columns of a sub-region, or of the whole domain.

    Attributes:
        z_m: (n_z + 1,) node depths under the surface.
        y_m: (n_y,) centres of the columns; only their distances matter.
    """

    z_m: RealArray
    y_m: RealArray

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.z_m) - 1, len(self.y_m)

    @property
    def num_cells(self) -> int:
        """Rows times columns."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to learn a prior; the defaults take about a minute for single columns on one core.

    Attributes:
        num_latent: numbers of a code.
        num_hidden: width of the two hidden layers on either side.
        num_sections: training set, a tenth of which is held out.
        num_steps: of Adam.
        batch_size: sections a step.
        learning_rate: at the start; it falls to zero along a cosine.
        seed: added to the prior's own, for an ensemble.
    """

    num_latent: int = 12
    num_hidden: int = 192
    num_sections: int = 30000
    num_steps: int = 12000
    batch_size: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_latent, self.num_hidden, self.num_steps, self.batch_size)
        if min(sizes) < 1 or self.num_sections < 10 or self.learning_rate <= 0:
            raise InversionError("a training's sizes must be positive, num_sections at least 10")
        if max(sizes) > 10**6 or self.num_sections > 10**7:
            raise InversionError("a training's sizes are at most 10^6, num_sections 10^7")


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What the training reached, on sections that it did not see.

    Attributes:
        rmse_of_depth: (n_z,) root mean square of decode(encode(m)) - m, decades.
        rmse: over all cells.
        code_size: root mean square of the codes' means and spreads; 1 if they are standard normal.
        duration_s: of the training.
    """

    rmse_of_depth: tuple[float, ...]
    rmse: float
    code_size: float
    duration_s: float


class ColumnNet(nn.Module):
    """Encoder and decoder: two hidden layers each, on normalized cells."""

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, num_cells: int, training: Training) -> None:
        super().__init__()
        width, latent = training.num_hidden, training.num_latent
        self.encoder = _two_hidden(num_cells, width, 2 * latent)
        self.decoder = _two_hidden(latent, width, num_cells)
        self.register_buffer("mean", torch.zeros(num_cells))
        self.register_buffer("spread", torch.ones(()))

    def encode(self, section_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the mean and the log variance of the codes."""
        mean_BL, log_variance_BL = self.encoder((section_BC - self.mean) / self.spread).chunk(2, -1)
        return mean_BL, log_variance_BL

    def decode(self, code_BL: torch.Tensor) -> torch.Tensor:
        """Give log10 rho of the cells."""
        return self.mean + self.spread * self.decoder(code_BL)

    def decoder_jacobian(self, code_BL: torch.Tensor) -> torch.Tensor:
        """Give d decode / d code, (B, C, L), layer by layer."""
        value = code_BL
        slope = torch.eye(code_BL.shape[1], dtype=code_BL.dtype).expand(len(code_BL), -1, -1)
        for layer in self.decoder:
            if isinstance(layer, nn.Linear):
                slope = layer.weight @ slope
            else:
                gate = torch.sigmoid(value)
                slope = (gate * (1 + value * (1 - gate)))[:, :, None] * slope  # of SiLU
            value = layer(value)
        return self.spread * slope


def _two_hidden(num_in: int, width: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_in, width), nn.SiLU(),
        nn.Linear(width, width), nn.SiLU(),
        nn.Linear(width, num_out),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PriorNetwork:
    """A learnt prior: the network in float64, with the prior and the grid that it was made for."""

    prior: Prior
    grid: CodeGrid
    training: Training
    learnt: Learnt
    net: ColumnNet = field(repr=False)

    @property
    def num_latent(self) -> int:
        """Numbers of a code."""
        return self.training.num_latent

    def decode(self, codes: RealArray) -> RealArray:
        """Give sections of log10 rho, (n, n_z, n_y), of codes (n, num_latent)."""
        with torch.no_grad():
            cells = self.net.decode(torch.from_numpy(codes))
        return cells.numpy().reshape(-1, *self.grid.shape)

    def jacobian(self, codes: RealArray) -> RealArray:
        """Give d decode / d code, (n, n_z * n_y, num_latent), by the chain rule."""
        with torch.no_grad():
            return self.net.decoder_jacobian(torch.from_numpy(codes)).numpy()

    def encode(self, sections: RealArray) -> RealArray:
        """Give the mean codes, (n, num_latent), of sections (n, n_z, n_y)."""
        flat = np.ascontiguousarray(sections, dtype=float).reshape(len(sections), -1)
        if flat.shape[1] != self.grid.num_cells:
            raise InversionError(
                f"sections of {sections.shape[1:]} cells; this prior was learnt on "
                f"{self.grid.shape}"
            )
        with torch.no_grad():
            return self.net.encode(torch.from_numpy(flat))[0].numpy()


def learn_prior(
    prior: Prior,
    grid: CodeGrid,
    *,
    training: Training,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> PriorNetwork:
    """Draw a training set and train the network on it.

    Args:
        prior: what to learn.
        grid: cells of one code.
        training: sizes and seed. Equal seeds, versions and thread counts give equal networks.
        on_step: called every 500 steps with the step and the loss (nats per cell).
    """
    began = time.perf_counter()
    seed = prior.seed + training.seed
    drawn = draw_sections(
        prior, z_m=grid.z_m, y_m=grid.y_m, count=training.num_sections, seed=seed
    ).reshape(training.num_sections, -1)
    cells = torch.from_numpy(drawn).float()
    num_held = training.num_sections // 10
    held, taught = cells[:num_held], cells[num_held:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ColumnNet(grid.num_cells, training)
        net.mean.copy_(taught.mean(0))
        net.spread.copy_(taught.std())
        _train(net, taught, training, on_step)
    net = net.double().eval().requires_grad_(False)
    return PriorNetwork(
        prior=prior,
        grid=grid,
        training=training,
        learnt=_judge(net, held.double(), grid, time.perf_counter() - began),
        net=net,
    )


def _train(
    net: ColumnNet,
    taught: torch.Tensor,
    training: Training,
    on_step: Callable[[int, float], None],
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=training.num_steps)
    num_cells = taught.shape[1]
    for step in range(training.num_steps):
        batch = taught[torch.randint(len(taught), (training.batch_size,))]
        mean, log_variance = net.encode(batch)
        code = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        error = ((net.decode(code) - batch) ** 2).mean()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        # The best Gaussian spread is the error itself, which leaves its logarithm.
        loss = torch.log(error) / 2 + divergence / num_cells
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            if not math.isfinite(loss.item()):
                raise InversionError(f"learning the prior failed at step {step}: loss {loss:g}")
            on_step(step, loss.item())


def _judge(net: ColumnNet, held: torch.Tensor, grid: CodeGrid, duration_s: float) -> Learnt:
    mean, log_variance = net.encode(held)
    error = (net.decode(mean) - held).reshape(-1, *grid.shape)
    return Learnt(
        rmse_of_depth=tuple((error**2).mean((0, 2)).sqrt().tolist()),
        rmse=float((error**2).mean().sqrt()),
        code_size=float((mean**2 + log_variance.exp()).mean().sqrt()),
        duration_s=duration_s,
    )

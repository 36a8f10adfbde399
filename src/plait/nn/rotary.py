"""Rotary position embedding, in the half-split layout of Hugging Face checkpoints."""

# Shapes: B batch, T tokens, N heads, H head size.

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of the rotation.

    `kind` is how they are stretched beyond the length of pre-training: not at all, all by `factor`
    ("linear"), or only the slow ones ("llama3", the remaining four fields).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.theta <= 0 or self.factor < 1:
            raise ModelError(
                "rope needs theta > 0 and factor >= 1, "
                f"got theta={self.theta}, factor={self.factor}."
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(
                f"rope kind llama3 needs high_freq_factor > low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}."
            )

    def inverse_frequencies(self, head_size: int, device: torch.device | None = None) -> Tensor:
        """Angle per position of each pair, float32 (H/2,) [radians] [Su et al. 2021, eq. 15]."""
        exponents = (
            torch.arange(0, head_size, 2, dtype=torch.int64, device=device).float() / head_size
        )
        frequencies = 1.0 / (self.theta**exponents)
        match self.kind:
            case "default":
                return frequencies
            case "linear":
                return frequencies / self.factor
            case "llama3":
                return self._stretch_slow(frequencies)

    def _stretch_slow(self, frequencies: Tensor) -> Tensor:
        # Llama 3.1: wavelengths beyond the old context are stretched, short ones kept, those
        # between blended [Grattafiori et al. 2024, arXiv:2407.21783; reference code apply_scaling].
        wavelengths = 2 * math.pi / frequencies
        old = self.original_max_positions
        blend = (old / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * frequencies / self.factor + blend * frequencies
        slow = torch.where(
            wavelengths > old / self.low_freq_factor, frequencies / self.factor, frequencies
        )
        is_between = (wavelengths >= old / self.high_freq_factor) & (
            wavelengths <= old / self.low_freq_factor
        )
        return torch.where(is_between, blended, slow)


def rotation_tables(rope: Rope, positions_BT: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the positions, float32, each (B, 1, T, H)."""
    angles = positions_BT[..., None].float() * rope.inverse_frequencies(
        head_size, positions_BT.device
    )
    angles_B1TH = torch.cat((angles, angles), dim=-1)[:, None]
    return angles_B1TH.cos(), angles_B1TH.sin()


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) by its angle; the result has the input's dtype."""
    cos, sin = cos_B1TH.to(x_BNTH.dtype), sin_B1TH.to(x_BNTH.dtype)
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat((-second, first), dim=-1) * sin

"""Rotary position embedding, in the half-split layout of Hugging Face checkpoints."""

# Shapes: B batch, T tokens, N heads, H head size, R the part of it that is turned.

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.errors import ModelError

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of the rotation.

    `kind` is how they are stretched beyond the length of pre-training (original_max_positions): not
    at all, all by `factor` ("linear"), only the slow ones ("llama3", with low_ and
    high_freq_factor; "yarn", with the betas), or each by a factor of its own ("longrope":
    `short_factors` up to that length, `long_factors` beyond).
    fraction: part of a head that is turned. attention_factor: on cosines and sines, of yarn and
    longrope; None = what their papers say, or what DeepSeek's two mscales make of it.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    fraction: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

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
        if not 0 < self.fraction <= 1:
            raise ModelError(f"rope needs a fraction between 0 and 1, got {self.fraction}.")
        if self.kind == "longrope" and len(self.short_factors) != len(self.long_factors):
            raise ModelError(
                f"rope kind longrope has {len(self.short_factors)} short factors "
                f"and {len(self.long_factors)} long ones; it needs as many of each."
            )

    def inverse_frequencies(
        self, head_size: int, device: torch.device | None = None, *, is_long: bool = False
    ) -> Tensor:
        """Angle per position of each pair, float32 (R/2,) [radians] [Su et al. 2021, eq. 15].

        is_long: take the long factors of "longrope".
        """
        size = int(head_size * self.fraction)
        exponents = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
        frequencies = 1.0 / (self.theta**exponents)
        match self.kind:
            case "default":
                return frequencies
            case "linear":
                return frequencies / self.factor
            case "llama3":
                return self._stretch_slow(frequencies)
            case "yarn":
                return self._interpolate_slow(frequencies)
            case "longrope":
                factors = self.long_factors if is_long else self.short_factors
                if len(factors) != len(frequencies):
                    raise ModelError(
                        f"rope kind longrope has {len(factors)} factors "
                        f"for {len(frequencies)} pairs."
                    )
                return frequencies / torch.tensor(factors, device=device)

    def table_factor(self) -> float:
        """Factor on all cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":  # [Peng et al. 2023, arXiv:2309.00071, eq. 22]
            if self.mscale and self.mscale_all_dim:
                return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
            return self._grown(1.0)
        if self.kind == "longrope":  # [Ding et al. 2024, arXiv:2402.13753, section 3.3]
            if self.factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions))
        return 1.0

    def score_factor(self) -> float:
        """Factor on the attention scores, of DeepSeek's yarn [reference code, softmax_scale]."""
        return self._grown(self.mscale_all_dim) ** 2 if self.kind == "yarn" else 1.0

    def _grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def _interpolate_slow(self, frequencies: Tensor) -> Tensor:
        # YaRN: pairs that turn less than beta_slow times over the old context are stretched, those
        # beyond beta_fast kept, a ramp between [Peng et al. 2023, eq. 17 to 19].
        size = 2 * len(frequencies)

        def pair_turning(times: float) -> float:
            length = self.original_max_positions / (times * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(self.theta))

        low = max(math.floor(pair_turning(self.beta_fast)), 0)
        high = min(math.ceil(pair_turning(self.beta_slow)), size - 1)
        pairs = torch.arange(size // 2, dtype=torch.float32, device=frequencies.device)
        stretched = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)

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


def rotation_tables(
    rope: Rope, positions_BT: Tensor, head_size: int, *, is_long: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the positions, float32, each (B, 1, T, R)."""
    angles = positions_BT[..., None].float() * rope.inverse_frequencies(
        head_size, positions_BT.device, is_long=is_long
    )
    angles_B1TR = torch.cat((angles, angles), dim=-1)[:, None]
    cos_B1TR, sin_B1TR = angles_B1TR.cos(), angles_B1TR.sin()
    if (factor := rope.table_factor()) != 1.0:
        return cos_B1TR * factor, sin_B1TR * factor
    return cos_B1TR, sin_B1TR


def rotate(x_BNTH: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) by its angle, leave the rest: in the input's dtype."""
    cos, sin = cos_B1TR.to(x_BNTH.dtype), sin_B1TR.to(x_BNTH.dtype)
    size = cos.shape[-1]
    if size < x_BNTH.shape[-1]:
        return torch.cat((_turn(x_BNTH[..., :size], cos, sin), x_BNTH[..., size:]), dim=-1)
    return _turn(x_BNTH, cos, sin)


def deinterleave(x_BNTH: Tensor) -> Tensor:
    """Bring pairs that stand side by side, (2i, 2i + 1), to the places of `rotate`."""
    return x_BNTH.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _turn(x_BNTR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BNTR.chunk(2, dim=-1)
    return x_BNTR * cos + torch.cat((-second, first), dim=-1) * sin

"""What can be said of a tensor in one line: its form, its range, how much of it is not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the finite elements, of a complex tensor those of the absolute value; NaN if none is."""

    form: str
    num_elements: int
    num_nan: int
    num_inf: int
    smallest: float
    largest: float
    mean: float
    std: float
    num_zeros: int

    @property
    def is_finite(self) -> bool:
        """Whether there is neither NaN nor Inf."""
        return self.num_nan == 0 and self.num_inf == 0

    def __str__(self) -> str:
        """One line, such as "f32[2, 4]  -1.2 to 3.4, mean 0.1, std 0.9, 3 NaN of 8"."""
        parts = []
        if self.num_elements - self.num_nan - self.num_inf > 0:
            parts.append(f"{self.smallest:.4g} to {self.largest:.4g}")
            if self.num_elements > 1:
                parts.append(f"mean {self.mean:.4g}, std {self.std:.4g}")
        counts = {"NaN": self.num_nan, "Inf": self.num_inf, "zero": self.num_zeros}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        of = f" (of {self.num_elements} elements)" if any(counts.values()) else ""
        return f"{self.form}  {', '.join(parts) or 'empty'}{of}"


@torch.no_grad()
def statistics(x: Tensor) -> Statistics:
    """Look at every element; waits for the device."""
    x = x.detach()
    values = x.abs() if x.is_complex() else x
    values = values.to(torch.float64).flatten()
    finite = values[values.isfinite()]
    nothing = float("nan")
    return Statistics(
        form=form_of(x),
        num_elements=x.numel(),
        num_nan=int(x.isnan().sum()),
        num_inf=int((~x.isfinite()).sum() - x.isnan().sum()),
        smallest=finite.min().item() if finite.numel() else nothing,
        largest=finite.max().item() if finite.numel() else nothing,
        mean=finite.mean().item() if finite.numel() else nothing,
        std=finite.std(correction=0).item() if finite.numel() else nothing,
        num_zeros=int((values == 0).sum()) if x.dtype != torch.bool else 0,
    )


def form_of(x: Tensor) -> str:
    """Dtype and shape in short: "bf16[4, 8]"; the device too where it is not the CPU."""
    name = str(x.dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    short = f"{_SHORT[kind]}{name.removeprefix(kind)}" if kind in _SHORT else name
    device = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{short}[{', '.join(str(size) for size in x.shape)}]{device}"


def describe_value(value: object) -> str:
    """One line for what a step takes or returns, tensor or not."""
    if isinstance(value, Tensor):
        return str(statistics(value))
    if isinstance(value, list | tuple):
        return "; ".join(describe_value(item) for item in value)
    return repr(value)

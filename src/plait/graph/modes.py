"""The modes under which a piece of a program runs: gradients on or off, autocast."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Modes:
    """autocast: (device type, dtype) of the devices for which it is on."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @contextmanager
    def entered(self) -> Generator[None]:
        """Run under these modes, and restore what was there."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            given = dict(self.autocast)
            for device in _device_types():
                stack.enter_context(
                    torch.autocast(device, dtype=given.get(device), enabled=device in given)
                )
            yield


def current_modes() -> Modes:
    """The modes that hold now."""
    return Modes(
        grad=torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        autocast=tuple(
            (device, torch.get_autocast_dtype(device))
            for device in _device_types()
            if torch.is_autocast_enabled(device)
        ),
    )


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

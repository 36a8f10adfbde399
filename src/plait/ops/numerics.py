"""The two kinds of numerics, and what they have in common.

"fast" takes PyTorch's quickest kernels. "strict" fixes every order of summation: the result and the
input gradient of a row do not depend, bit for bit, on how many rows there are, on their order or on
their neighbours.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from plait.errors import ModelError

Numerics = Literal["fast", "strict"]


def bfloat16_pays(device_type: str) -> bool:
    """Say whether products in bfloat16 are faster there than in float32.

    On a CPU without instructions for them they are emulated, and take many times longer.
    """
    if device_type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert to the dtype of the enclosing `torch.autocast`, as PyTorch does for its products."""
    dtype = autocast_dtype(tensors[0].device.type)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the products of the enclosing `torch.autocast`, None outside of any."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products in the dtypes of their operands; nothing is done outside of `torch.autocast`."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype operands of a dtype are multiplied fastest, and no less exactly.

    An x86 CPU without units for bfloat16 multiplies it at a tenth to a twentieth of the speed of
    float32 (measured on Zen 3 with torch 2.13).
    """
    is_emulated = dtype == torch.bfloat16 and not bfloat16_pays(device.type)
    return torch.float32 if is_emulated else dtype


def check_alike(name: str, *tensors: Tensor) -> None:
    """Raise ModelError unless all tensors have one floating-point dtype and one device."""
    dtypes, devices = ({getattr(t, key) for t in tensors} for key in ("dtype", "device"))
    if len(dtypes) > 1 or not tensors[0].dtype.is_floating_point:
        given = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ModelError(f"{name} needs one floating-point dtype, got {given}. Convert them first.")
    if len(devices) > 1:
        given = ", ".join(str(tensor.device) for tensor in tensors)
        raise ModelError(f"{name} needs its tensors on one device, got {given}. Move them first.")

"""Autocast, which custom operators do not follow by themselves."""

from contextlib import nullcontext

import torch

_NOTHING = nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the autocast dtype of a device where autocast is on, else None."""
    return torch.get_autocast_dtype(device_type) if _is_on(device_type) else None


def to_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` in the autocast dtype of its device where autocast is on, float64 excepted."""
    castable = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    dtype = autocast_dtype(tensor.device.type) if castable else None
    return tensor if dtype is None else tensor.to(dtype)


def without_autocast(device_type: str):
    """Returns a context manager in which the operations of torch compute in the dtypes of their inputs."""
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else _NOTHING


def _is_on(device_type):
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

"""Autocast: custom operators do not follow it by themselves."""

import torch


def to_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the autocast dtype of its device where autocast is on, float64 excepted."""
    device = tensor.device.type
    castable = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if castable and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor

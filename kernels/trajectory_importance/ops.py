"""What torch is told about the operation. It has no gradients."""

import torch

from ..runtime.arguments import Arguments
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch."""
    return Operation(
        arguments, __package__, settings="SymInt height, SymInt width, float sigma",
        fake_forward=_fake_forward, fake_backward=None,
    )  # fmt: skip


def _fake_forward(points, valid, height, width, sigma):
    return points.new_empty((points.shape[0], height, width), dtype=torch.float32)

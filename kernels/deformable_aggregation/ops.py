"""What torch is told about the operation."""

import torch

from ..runtime.arguments import Arguments
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch.

    The torch backend's gradients are written by hand too: how many points count is known only when it runs, which a
    graph could not hold.
    """
    return Operation(
        arguments, __package__, fake_forward=_fake_forward, fake_backward=_fake_backward,
        saved=list(arguments.arguments), by_hand=("torch", "triton"),
    )  # fmt: skip


def _fake_forward(feature_maps, points, weights, visible):
    return feature_maps[0].new_empty((*points.shape[:2], feature_maps[0].shape[2]))


def _fake_backward(feature_maps, points, weights, visible):
    others = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (points, weights)]
    return [*(torch.empty_like(maps) for maps in feature_maps), *others]

"""What torch is told about the operation."""

import torch

from ..runtime.arguments import Arguments
from ..runtime.launch import memory_format
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch. `bev_warp` calls it without depths."""
    return Operation(
        arguments, __package__, settings="SymInt height, SymInt width, bool nearest, float min_depth",
        results=("warped", "coverage"), public=2, saved=list(arguments.arguments), absent=("depths",),
        fake_forward=_fake_forward, fake_backward=_fake_backward, by_hand=("torch", "triton"),
    )  # fmt: skip


def _fake_forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    targets, channels = projection.shape[0], features.shape[1]
    layout = dict(dtype=features.dtype, device=features.device, memory_format=memory_format(features))
    warped = torch.empty((targets, channels, height, width), **layout)
    return warped, torch.empty((targets, height, width), dtype=torch.float32, device=features.device)


def _fake_backward(features, projection, depths, weights, offsets, source_index):
    return [None if tensor is None else torch.empty_like(tensor) for tensor in (features, weights, offsets)]

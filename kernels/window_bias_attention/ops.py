"""What torch is told about the operation."""

import torch

from ..runtime.arguments import Arguments
from ..runtime.launch import accumulator_dtype
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch. `maps` are flat: height, width and window of each map in turn.

    For the backward pass, `lse`: the logarithm of each query's sum (in base 2 by Triton, e by PyTorch); `order`: see
    `query_order`.
    """
    return Operation(
        arguments, __package__, by_hand=("torch", "triton"), results=("out", "lse", "order"),
        settings="int[] maps, float min_scale, float max_scale, float max_bias, float scale",
        saved=("out", "lse", "order", *arguments.arguments), fake_forward=_fake_forward, fake_backward=_fake_backward,
    )  # fmt: skip


def _fake_forward(query, key, value, centers, *others):
    batch, length, heads, _ = query.shape
    lse = query.new_empty((batch, heads, length), dtype=accumulator_dtype(query.dtype))
    order = centers.new_empty((batch, centers.shape[2], length), dtype=torch.int64)
    return query.new_empty(query.shape), lse, order


def _fake_backward(out, lse, order, query, key, value, centers, weights, bias_scale):
    return [tensor.new_empty(tensor.shape) for tensor in (query, key, value, weights, bias_scale)]

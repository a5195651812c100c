"""What torch is told about the operation."""

from ..runtime.arguments import Arguments
from ..runtime.launch import accumulator_dtype
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch. `maps` are flat: height, width and window of each map in turn.

    `lse`: the logarithm of each query's sum (in base 2 by Triton, e by PyTorch), for the backward pass. The torch
    backend's gradients are written by hand: how many tokens are in windows is known only when it runs.
    """
    return Operation(
        arguments, __package__, by_hand=("torch", "triton"), results=("out", "lse"),
        settings="int[] maps, float scale", saved=("out", "lse", *arguments.arguments),
        fake_forward=_fake_forward, fake_backward=_fake_backward,
    )  # fmt: skip


def _fake_forward(query, *others):
    batch, length, heads, _ = query.shape
    lse = query.new_empty((batch, heads, length), dtype=accumulator_dtype(query.dtype))
    return query.new_empty(query.shape), lse


def _fake_backward(out, lse, query, key, value, centers):
    return [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]

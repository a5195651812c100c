"""What torch is told about the operation."""

import torch

from ..runtime.arguments import Arguments
from ..runtime.launch import accumulator_dtype
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch. `lse`: the logarithm (base 2) of each query's sum, for the backward pass."""
    return Operation(
        arguments, __package__, settings="float scale", results=("out", "lse"),
        fake_forward=_fake_forward, fake_backward=_fake_backward,
    )  # fmt: skip


def _fake_forward(query, key, value, block_table, key_mask, scale):
    queries, length, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((queries, heads, length), dtype=accumulator_dtype(query.dtype))


def _fake_backward(query, key, value, block_table, key_mask, out, lse):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]

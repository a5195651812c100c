"""Registration with torch and differentiation of the Triton backend."""

import torch

from ..runtime.library import register
from ..runtime.nvtx import annotate

_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor? key_mask"


def _forward(*arguments):
    from .triton import launch_forward

    return launch_forward(*arguments)


def _backward(*arguments):
    from .triton import launch_backward

    with annotate("cross_camera_attention.backward"):
        return launch_backward(*arguments)


def _fake_forward(query, key, value, block_table, key_mask, scale):
    queries, length, heads, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((queries, heads, length), dtype=lse_dtype)


def _fake_backward(grad, query, key, value, block_table, key_mask, out, lse, scale, needs_grad):
    inputs = (query, key, value)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(inputs, needs_grad)
        if needed
    ]


_forward_op = register(
    f"cross_camera_attention({_ARGUMENTS}, float scale) -> (Tensor, Tensor)", _forward, _fake_forward
)
_backward_op = register(
    f"cross_camera_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse, float scale,"
    " bool[3] needs_grad) -> Tensor[]",
    _backward,
    _fake_backward,
)


class _CrossCameraAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, block_table, key_mask, scale):
        out, lse = _forward_op(query, key, value, block_table, key_mask, scale)
        ctx.save_for_backward(query, key, value, block_table, key_mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        needs_grad = list(ctx.needs_input_grad[:3])
        computed = iter(_backward_op(grad, *ctx.saved_tensors, ctx.scale, needs_grad))
        return *(next(computed) if needed else None for needed in needs_grad), None, None, None


cross_camera_attention = _CrossCameraAttention.apply

"""Registration with torch and differentiation, for both backends: neither leaves the gradients to autograd."""

import torch

from ..runtime.library import register
from ..runtime.nvtx import annotate

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor centers, Tensor weights, Tensor bias_scale, "
    "int[] maps, float min_scale, float max_scale, float max_bias, float scale, str backend"
)


def _forward(query, *arguments):
    *arguments, backend = arguments
    if backend == "triton":
        from .triton import launch_forward as forward
    else:
        from .torch import forward
    with torch.autocast(query.device.type, enabled=False):
        return forward(query, *arguments)


def _backward(grad, *arguments):
    *arguments, backend, needs_grad = arguments
    if backend == "triton":
        from .triton import launch_backward as backward
    else:
        from .torch import backward
    with annotate("window_bias_attention.backward"), torch.autocast(grad.device.type, enabled=False):
        return backward(grad, *arguments, needs_grad)


def _fake_forward(query, *others):
    batch, length, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=dtype)


def _fake_backward(grad, out, lse, query, key, value, centers, weights, bias_scale, *others):
    inputs = (query, key, value, weights, bias_scale)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(inputs, others[-1]) if needed]


_forward_op = register(f"window_bias_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_op = register(
    "window_bias_attention_backward("
    f"Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}, bool[5] needs_grad) -> Tensor[]",
    _backward,
    _fake_backward,
)


class _WindowBiasAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        out, lse = _forward_op(*arguments)
        ctx.save_for_backward(out, lse, *arguments[:6])
        ctx.settings = arguments[6:]
        return out

    @staticmethod
    def backward(ctx, grad):
        needs_grad = [ctx.needs_input_grad[position] for position in (0, 1, 2, 4, 5)]
        computed = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.settings, needs_grad))
        dquery, dkey, dvalue, dweights, dscale = (next(computed) if needed else None for needed in needs_grad)
        return dquery, dkey, dvalue, None, dweights, dscale, *[None] * 6


window_bias_attention = _WindowBiasAttention.apply

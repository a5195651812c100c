"""Registration with torch and differentiation, for both backends: a row of −inf alone is beyond autograd."""

import torch

from ..runtime.library import register
from ..runtime.nvtx import annotate

_ARGUMENTS = "Tensor bias, Tensor bias_scale, float min_scale, float max_scale, float max_bias, str backend"


def _forward(*arguments):
    *arguments, backend = arguments
    if backend == "triton":
        from .triton import launch_forward as forward
    else:
        from .torch import forward
    return forward(*arguments)


def _backward(*arguments):
    *arguments, backend, needs_grad = arguments
    if backend == "triton":
        from .triton import launch_backward as backward
    else:
        from .torch import backward
    with annotate("bias_softmax.backward"):
        return backward(*arguments, needs_grad)


def _fake_forward(scores, *others):
    return scores.new_empty(scores.shape)


def _fake_backward(grad, probabilities, bias, bias_scale, *others):
    inputs = (probabilities, bias, bias_scale)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(inputs, others[-1]) if needed]


_forward_op = register(f"bias_softmax(Tensor scores, {_ARGUMENTS}) -> Tensor", _forward, _fake_forward)
_backward_op = register(
    f"bias_softmax_backward(Tensor grad, Tensor probabilities, {_ARGUMENTS}, bool[3] needs_grad) -> Tensor[]",
    _backward,
    _fake_backward,
)


class _BiasSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, *arguments):
        probabilities = _forward_op(scores, *arguments)
        ctx.save_for_backward(probabilities, *arguments[:2])
        ctx.settings = arguments[2:]
        return probabilities

    @staticmethod
    def backward(ctx, grad):
        needs_grad = list(ctx.needs_input_grad[:3])
        computed = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.settings, needs_grad))
        return *(next(computed) if needed else None for needed in needs_grad), *[None] * 4


bias_softmax = _BiasSoftmax.apply

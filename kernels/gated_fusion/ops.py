"""Registration with torch and differentiation of the Triton backend."""

import torch

from ..runtime.library import register
from ..runtime.nvtx import annotate

_ARGUMENTS = "Tensor original, Tensor completed, Tensor gate_logits, Tensor? fine, Tensor? importance, Tensor? missing"


def _forward(*arguments):
    from .triton import launch_forward

    return launch_forward(*arguments)


def _backward(grad, *arguments):
    from .triton import launch_backward

    with annotate("gated_fusion.backward"):
        return launch_backward(grad, *arguments)


def _fake_forward(original, *others):
    return torch.empty_like(original)


def _fake_backward(grad, original, completed, gate_logits, fine, importance, missing, needs_grad):
    inputs = (original, completed, gate_logits, fine, importance)
    return [torch.empty_like(tensor) for tensor, needed in zip(inputs, needs_grad) if needed]


_forward_op = register(f"gated_fusion({_ARGUMENTS}) -> Tensor", _forward, _fake_forward)
_backward_op = register(
    f"gated_fusion_backward(Tensor grad, {_ARGUMENTS}, bool[5] needs_grad) -> Tensor[]", _backward, _fake_backward
)


class _GatedFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        return _forward_op(*arguments)

    @staticmethod
    def backward(ctx, grad):
        needs_grad = list(ctx.needs_input_grad[:5])
        computed = iter(_backward_op(grad, *ctx.saved_tensors, needs_grad))
        return *(next(computed) if needed else None for needed in needs_grad), None


gated_fusion = _GatedFusion.apply

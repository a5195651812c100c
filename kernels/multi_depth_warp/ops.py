"""Registration with torch and differentiation of the Triton backend."""

import torch

from ..runtime.launch import memory_format
from ..runtime.library import register
from ..runtime.nvtx import annotate

_ARGUMENTS = (
    "Tensor features, Tensor projection, Tensor? depths, Tensor? weights, Tensor? offsets, Tensor? source_index, "
    "SymInt height, SymInt width, bool nearest, float min_depth"
)


def _forward(*arguments):
    from .triton import launch_forward

    return launch_forward(*arguments)


def _backward(grad, *arguments):
    from .triton import launch_backward

    with annotate("multi_depth_warp.backward"):
        return launch_backward(grad, *arguments)


def _fake_forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    targets, channels = projection.shape[0], features.shape[1]
    layout = dict(dtype=features.dtype, device=features.device, memory_format=memory_format(features))
    warped = torch.empty((targets, channels, height, width), **layout)
    return warped, torch.empty((targets, height, width), dtype=torch.float32, device=features.device)


def _fake_backward(grad, features, projection, depths, weights, offsets, *others):
    return [torch.empty_like(t) for t, needed in zip((features, weights, offsets), others[-1]) if needed]


_forward_op = register(f"multi_depth_warp({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_op = register(
    f"multi_depth_warp_backward(Tensor grad, {_ARGUMENTS}, bool[3] needs_grad) -> Tensor[]", _backward, _fake_backward
)


class _MultiDepthWarp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:6])
        ctx.settings = arguments[6:]
        warped, coverage = _forward_op(*arguments)
        ctx.mark_non_differentiable(coverage)
        return warped, coverage

    @staticmethod
    def backward(ctx, grad, _):
        needs_grad = [ctx.needs_input_grad[position] for position in (0, 3, 4)]
        computed = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.settings, needs_grad))
        dfeatures, dweights, doffsets = (next(computed) if needed else None for needed in needs_grad)
        return dfeatures, None, None, dweights, doffsets, *[None] * 5


multi_depth_warp = _MultiDepthWarp.apply

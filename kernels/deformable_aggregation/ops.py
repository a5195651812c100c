"""Registration with torch and differentiation of the backends "torch" and "triton"."""

import torch
from torch.autograd.function import once_differentiable

from ..runtime.nvtx import annotate
from ..runtime.operation import register

_ARGUMENTS = "Tensor[] feature_maps, Tensor points, Tensor weights, Tensor? visible"


def _fake_forward(feature_maps, points, weights, visible):
    return feature_maps[0].new_empty((*points.shape[:2], feature_maps[0].shape[2]))


def _fake_backward(grad, feature_maps, points, weights, visible, needs_grad):
    results = [torch.empty_like(maps) for maps in feature_maps]
    results += [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (points, weights)]
    return [result for result, needed in zip(results, needs_grad) if needed]


def _torch_forward(*arguments):
    from .torch import forward

    return forward(*arguments)


def _torch_backward(*arguments):
    from .torch import backward

    with annotate("deformable_aggregation.backward"):
        return backward(*arguments)


def _triton_forward(*arguments):
    from .triton import launch_forward

    return launch_forward(*arguments)


def _triton_backward(*arguments):
    from .triton import launch_backward

    with annotate("deformable_aggregation.backward"):
        return launch_backward(*arguments)


def _register(name, forward, backward):
    backward_arguments = f"Tensor grad, {_ARGUMENTS}, bool[] needs_grad"
    return (
        register(f"{name}({_ARGUMENTS}) -> Tensor", forward, _fake_forward),
        register(f"{name}_backward({backward_arguments}) -> Tensor[]", backward, _fake_backward),
    )


# The torch backend is an op too: how many points count is known only when it runs, which a graph could not hold.
_OPS = {
    "torch": _register("deformable_aggregation_torch", _torch_forward, _torch_backward),
    "triton": _register("deformable_aggregation", _triton_forward, _triton_backward),
}


class _DeformableAggregation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, points, weights, visible, *feature_maps):
        ctx.backend = backend
        ctx.save_for_backward(points, weights, visible, *feature_maps)
        return _OPS[backend][0](list(feature_maps), points, weights, visible)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        points, weights, visible, *feature_maps = ctx.saved_tensors
        of_points, of_weights, _, *of_maps = ctx.needs_input_grad[1:]
        needs_grad = [*of_maps, of_points, of_weights]
        computed = iter(_OPS[ctx.backend][1](grad, feature_maps, points, weights, visible, needs_grad))
        *dmaps, dpoints, dweights = (next(computed) if needed else None for needed in needs_grad)
        return None, dpoints, dweights, None, *dmaps


def deformable_aggregation(backend, feature_maps, points, weights, visible):
    return _DeformableAggregation.apply(backend, points, weights, visible, *feature_maps)

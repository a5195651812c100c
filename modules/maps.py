"""Replacing some of a batch's maps."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


class _Take(torch.autograd.Function):
    """Returns the maps at (sample, camera), and all of them for `_Put`."""

    @staticmethod
    def forward(ctx, features, sample, camera):
        ctx.save_for_backward(sample, camera)
        return features[sample, camera], features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_maps, grad_rest):
        grad = grad_rest.clone()
        grad[ctx.saved_tensors] = grad_maps
        return grad, None, None


class _Put(torch.autograd.Function):
    """Returns all maps with those at (sample, camera) replaced; `_Take` overwrites the gradient that they had."""

    @staticmethod
    def forward(ctx, rest, sample, camera, maps):
        ctx.save_for_backward(sample, camera)
        ctx.dtype = maps.dtype
        replaced = rest.clone()
        replaced[sample, camera] = maps.to(rest.dtype)
        return replaced

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None, None, grad[ctx.saved_tensors].to(ctx.dtype)


def wanted_maps(missing: torch.Tensor, every: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample and camera of the maps that are missing (B, V), in order; or of every one, which makes shapes that do not
    hang on values."""
    if not every:
        return missing.nonzero().unbind(1)
    index = torch.arange(missing.numel(), device=missing.device)
    return index // missing.shape[1], index % missing.shape[1]


def replace_maps(
    features: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor],
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    only: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replaces the maps at `index` by `function` of them; the others return bit for bit.

    Indexing and `index_put` would do the same; their gradients hold three tensors of the size of `features`, these one.

    Args:
        features: (B, V, C, H, W); gets gradients.
        index: sample and camera of each map, (Nq,) each, no pair twice.
        function: (Nq, C, H, W) → (Nq, C, H, W).
        only: (B, V) bool. With it `index` is that of every map, and `function` sees all of them; these are replaced.
    """
    if only is not None:
        replaced = function(features.flatten(0, 1)).unflatten(0, only.shape)
        return torch.where(only[:, :, None, None, None], replaced.to(features.dtype), features)
    maps, rest = _Take.apply(features, *index)
    return _Put.apply(rest, *index, function(maps))

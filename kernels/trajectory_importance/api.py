"""The public function."""

import math

import torch

from ..runtime.backends import choose_backend
from ..runtime.checks import Shapes, check_dtype, check_no_grad, check_same_device
from ..runtime.nvtx import annotate

NAME = "trajectory_importance"


def trajectory_importance(
    points: torch.Tensor, valid: torch.Tensor, size: tuple[int, int], *, sigma: float, backend: str | None = None
) -> torch.Tensor:
    """Importance `exp(−d² / 2σ²)` of every cell, d = its distance from the polyline through the valid points.

    The polyline joins each valid point to the next valid one; points in between that are not valid are skipped. One
    valid point is a point, none gives zeros. A point that is not finite is not valid.

    Args:
        points: (N, T, 2) float32 or float64, (x, y) in cells, integers at cell centres. Gets no gradient.
        valid: (N, T) bool.
        size: (H, W) of the result.
        sigma: > 0, in cells.
        backend: None or "auto", "torch", "triton".

    Returns:
        (N, H, W) float32 in [0, 1].

    Raises:
        ValueError: a shape, a device, `size` or `sigma` does not fit, or `points` requires grad.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    shapes = Shapes(NAME)
    shapes.bind("points", points, "N", "T", 2)
    shapes.bind("valid", valid, "N", "T")
    if len(size) != 2 or min(size) < 0:
        raise ValueError(f"{NAME}: size is {tuple(size)}, needs (height, width), each at least 0")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"{NAME}: sigma is {sigma}, needs a finite number above 0")
    check_dtype(NAME, "points", points, (torch.float32, torch.float64))
    check_dtype(NAME, "valid", valid, (torch.bool,))
    check_same_device(NAME, "points", points, valid=valid)
    check_no_grad(NAME, points=points)
    if choose_backend(backend, points, valid) == "torch":
        from .torch import trajectory_importance as implementation
    else:
        from .ops import trajectory_importance as implementation
    with annotate(NAME):
        return implementation(points.detach(), valid, *size, sigma)

"""The public function."""

import torch

from ..runtime.arguments import Argument, Arguments, boolean
from ..runtime.checks import check_number, check_size
from . import ops

ARGUMENTS = Arguments(
    "trajectory_importance",
    points=Argument((("N", "T", 2),), lambda first: (torch.float32, torch.float64)),
    valid=Argument((("N", "T"),), boolean),
)
OPERATION = ops.register(ARGUMENTS)
SMALLEST, LARGEST = 1e-37, 3e38  # sigmas that float32 can hold, a quarter of them too


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
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        (N, H, W) float32 in [0, 1].

    Raises:
        ValueError: a shape, a device, `size` or `sigma` does not fit, or `points` requires grad.
        TypeError: a dtype is not supported, or `sigma` is no number.
        BackendError: the backend asked for cannot serve the call.
    """
    tensors, _ = ARGUMENTS.check(points, valid)
    height, width = check_size(ARGUMENTS.operation, "size", size)
    check_number(ARGUMENTS.operation, "sigma", sigma)
    if not sigma > 0:
        raise ValueError(f"{ARGUMENTS.operation}: sigma is {sigma}, needs a finite number above 0")
    return OPERATION(backend, tensors, height, width, min(max(float(sigma), SMALLEST), LARGEST))

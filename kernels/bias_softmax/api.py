"""The public function."""

from numbers import Real

import torch

from ..runtime.arguments import Argument, Arguments, any_float, geometry, wide_only_beside_wide
from ..runtime.checks import check_number
from . import ops

NAME = "bias_softmax"
ARGUMENTS = Arguments(
    NAME,
    scores=Argument(None, any_float, gradient=True),
    bias=Argument(None, wide_only_beside_wide, gradient=True),
    bias_scale=Argument(((),), geometry, gradient=True),
)
OPERATION = ops.register(ARGUMENTS)


def bias_softmax(
    scores: torch.Tensor,
    bias: torch.Tensor,
    bias_scale: torch.Tensor | float = 1.0,
    *,
    min_scale: float | None = None,
    max_scale: float | None = None,
    max_bias: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax over the last dimension of `scores + clamp(clamp(bias_scale, min_scale, max_scale) · bias, ±max_bias)`.

    A row whose entries are all −inf gives zeros, and zero gradients. The clamps pass gradients as `torch.clamp` does,
    limits included. Computed in float32 (float64 for float64 scores). Gradients of what is broadcast are summed in a
    fixed order, so results are bitwise repeatable.

    Args:
        scores: (..., keys). Gets gradients.
        bias: broadcastable to `scores`, any float dtype but float64 (float64 with float64 scores). Gets gradients.
        bias_scale: a number, or a () tensor float32 (float64 with float64 scores), which gets gradients.
        min_scale, max_scale: limits of `bias_scale`; None = none.
        max_bias: limit of the scaled bias, both ways; None = none.
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        Probabilities with the shape and dtype of `scores`, contiguous.

    Raises:
        ValueError: a shape, a device or a limit does not fit.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    if isinstance(bias_scale, Real) and isinstance(scores, torch.Tensor):
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        bias_scale = torch.full((), bias_scale, dtype=dtype, device=scores.device)
    elif not isinstance(bias_scale, (Real, torch.Tensor)):
        raise TypeError(f"{NAME}: bias_scale is a {type(bias_scale).__name__}, needs a number or a tensor")
    tensors, _ = ARGUMENTS.check(scores, bias, bias_scale)
    if scores.ndim == 0:
        raise ValueError(f"{NAME}: scores has shape (), needs (..., keys)")
    if not (bias.ndim <= scores.ndim and all(b in (1, s) for b, s in zip(bias.shape[::-1], scores.shape[::-1]))):
        shape, needed = tuple(bias.shape), tuple(scores.shape)
        raise ValueError(f"{NAME}: bias has shape {shape}, needs one that broadcasts to scores, {needed}")
    return OPERATION(backend, tensors, *_limits(min_scale, max_scale, max_bias))


def _limits(min_scale, max_scale, max_bias):
    for argument, number in dict(min_scale=min_scale, max_scale=max_scale, max_bias=max_bias).items():
        if number is not None:
            check_number(NAME, argument, number, "a number or None", finite=False)
    low = -torch.inf if min_scale is None else float(min_scale)
    high = torch.inf if max_scale is None else float(max_scale)
    limit = torch.inf if max_bias is None else float(max_bias)
    if low > high:
        raise ValueError(f"{NAME}: min_scale is {min_scale} and max_scale {max_scale}, needs min_scale ≤ max_scale")
    if limit < 0:
        raise ValueError(f"{NAME}: max_bias is {max_bias}, needs at least 0")
    return low, high, limit

"""The public function."""

from numbers import Real

import torch

from ..runtime.backends import choose_backend
from ..runtime.checks import FLOAT_DTYPES, Shapes, check_dtype, check_geometry_dtype, check_same_device
from ..runtime.nvtx import annotate

NAME = "bias_softmax"


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
        backend: None or "auto", "torch", "triton".

    Returns:
        Probabilities with the shape and dtype of `scores`, contiguous.

    Raises:
        ValueError: a shape, a device or a limit does not fit.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    _validate(scores, bias, bias_scale)
    limits = _limits(min_scale, max_scale, max_bias)
    if not isinstance(bias_scale, torch.Tensor):
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        bias_scale = torch.full((), bias_scale, dtype=dtype, device=scores.device)
    backend = choose_backend(backend, scores, bias, bias_scale)
    from .ops import bias_softmax as implementation

    with annotate(NAME):
        return implementation(scores, bias, bias_scale, *limits, backend)


def _validate(scores, bias, bias_scale):
    for argument, tensor in dict(scores=scores, bias=bias).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{NAME}: {argument} must be a tensor, got {type(tensor).__name__}")
    if scores.ndim == 0:
        raise ValueError(f"{NAME}: scores has shape (), needs (..., keys)")
    fits = bias.ndim <= scores.ndim and all(b in (1, s) for b, s in zip(bias.shape[::-1], scores.shape[::-1]))
    if not fits:
        raise ValueError(
            f"{NAME}: bias has shape {tuple(bias.shape)}, needs one that broadcasts to scores, {tuple(scores.shape)}"
        )
    check_dtype(NAME, "scores", scores, FLOAT_DTYPES)
    check_dtype(NAME, "bias", bias, [t for t in FLOAT_DTYPES if t != torch.float64 or scores.dtype == t])
    if isinstance(bias_scale, torch.Tensor):
        Shapes(NAME).bind("bias_scale", bias_scale)
        check_geometry_dtype(NAME, scores, bias_scale=bias_scale)
        check_same_device(NAME, "scores", scores, bias=bias, bias_scale=bias_scale)
    elif not isinstance(bias_scale, Real):
        raise TypeError(f"{NAME}: bias_scale is a {type(bias_scale).__name__}, needs a number or a tensor")
    check_same_device(NAME, "scores", scores, bias=bias)


def _limits(min_scale, max_scale, max_bias):
    for argument, number in dict(min_scale=min_scale, max_scale=max_scale, max_bias=max_bias).items():
        if number is not None and not isinstance(number, Real):
            raise TypeError(f"{NAME}: {argument} is a {type(number).__name__}, needs a number or None")
    low = -torch.inf if min_scale is None else float(min_scale)
    high = torch.inf if max_scale is None else float(max_scale)
    limit = torch.inf if max_bias is None else float(max_bias)
    if not low <= high:
        raise ValueError(f"{NAME}: min_scale is {min_scale} and max_scale {max_scale}, needs min_scale ≤ max_scale")
    if not limit >= 0:
        raise ValueError(f"{NAME}: max_bias is {max_bias}, needs at least 0")
    return low, high, limit

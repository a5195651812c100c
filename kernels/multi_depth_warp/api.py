"""The public functions."""

import torch

from ..runtime.arguments import Argument, Arguments, any_float, geometry, index
from ..runtime.checks import check_dense, check_indices, check_number, check_size
from . import ops

MODES = ("bilinear", "nearest")

_FEATURES = Argument((("S", "C", "Hs", "Ws"),), any_float, gradient=True)
ARGUMENTS = Arguments(
    "multi_depth_warp",
    features=_FEATURES,
    projection=Argument((("N", 3, 4), ("N", "D", 3, 4)), geometry),
    depths=Argument((("D",), ("N", "D")), geometry),
    weights=Argument((("N", "D", "H", "W"),), any_float, gradient=True, optional=True),
    offsets=Argument((("N", "D", "H", "W", 2), ("N", 1, "H", "W", 2)), geometry, gradient=True, optional=True),
    source_index=Argument((("N",), ("N", "D")), index, optional=True),
    limits={"D": (1, None)},
)
BEV_ARGUMENTS = Arguments(
    "bev_warp",
    features=_FEATURES,
    transform=Argument((("N", 2, 3),), geometry),
    source_index=Argument((("N",),), index, optional=True),
)
OPERATION = ops.register(ARGUMENTS)


def multi_depth_warp(
    features: torch.Tensor,
    projection: torch.Tensor,
    depths: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    source_index: torch.Tensor | None = None,
    output_size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    min_depth: float = 0.1,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Looks every target cell up in a source map at several depths and blends what it finds; no plane is stored.

    The target cell in row v, column u has its centre at (u, v). At depth d it is seen in the source at
    `p = P @ (u·d, v·d, d, 1)`, in source cells `x = p0 / p2 + offset_x`, `y = p1 / p2 + offset_y`, integers at cell
    centres, where `p2 > min_depth`. Hypotheses of one target may look into different maps, each by a projection of its
    own: a camera now, its neighbour, an earlier moment. Outside the source, at a location that is not finite, and
    behind `min_depth` the features are zero. Computed in float32 (float64 if any input is), whatever the dtypes and
    under autocast too; bit for bit repeatable, gradients included.

    Args:
        features: (S, C, Hs, Ws) source maps; channels_last is the fast layout. Gets gradients.
        projection: (N, 3, 4) float32, from a target cell at a depth in metres to source cells; or (N, D, 3, 4), a
            projection for each hypothesis. No gradient.
        depths: (D,) or (N, D) float32, metres, positive; D ≥ 1. No gradient.
        weights: (N, D, H, W) of any float dtype, the blend; None = 1/D each. Gets gradients.
        offsets: (N, D, H, W, 2), or (N, 1, H, W, 2) for all depths alike, float32, source cells, (x, y). Gets
            gradients, which are zero in mode "nearest".
        source_index: (N,) int32 or int64, the source map that each target reads; or (N, D), the one that each
            hypothesis reads, −1 = none, which counts nothing; None = the target's own, S == N. A CUDA index outside
            [0, S) reads nothing and gives zeros.
        output_size: (H, W); None = (Hs, Ws).
        mode: "bilinear", or "nearest": the cell at floor(x + 0.5), floor(y + 0.5).
        min_depth: metres, ≥ 0; a hypothesis counts only beyond it.
        backend: None or "auto", "torch", "triton", "definition".

    float64 features take float64 projection, depths and offsets too.

    Returns:
        warped: (N, C, H, W) in the dtype and memory format of `features`.
        coverage: (N, H, W) float32, the same sum over a map of ones. No gradient.

    Raises:
        ValueError: a shape, size, mode, device, depth or index does not fit, or `projection` or `depths` requires grad.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    name = ARGUMENTS.operation
    height, width = _output_size(name, output_size, features)
    tensors, sizes = ARGUMENTS.check(features, projection, depths, weights, offsets, source_index, H=height, W=width)
    _check_values(name, mode, source_index, sizes)
    check_number(name, "min_depth", min_depth, "a depth of at least 0", finite=False)
    if min_depth < 0:
        raise ValueError(f"{name}: min_depth is {min_depth}, needs a depth of at least 0")
    if depths.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((depths > 0).all()):
        raise ValueError(f"{name}: depths has values from {float(depths.min())}, needs positive ones")
    return OPERATION(backend, tensors, height, width, mode == "nearest", float(min_depth))


def bev_warp(
    features: torch.Tensor,
    transform: torch.Tensor,
    *,
    output_size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    source_index: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves bird's-eye-view maps by an affine transform: `multi_depth_warp` with the ground as its one plane.

    The target cell in row v, column u is looked up at `x = t00·u + t01·v + t02`, `y = t10·u + t11·v + t12`, in source
    cells, integers at cell centres, zeros outside. Computed in float32 (float64 if any input is).

    Args:
        features: (S, C, Hs, Ws) source maps; channels_last is the fast layout. Gets gradients.
        transform: (N, 2, 3) float32 (or float64 beside float64 features), target cells to source cells. No gradient.
        output_size: (H, W); None = (Hs, Ws).
        mode: "bilinear", or "nearest": the cell at floor(x + 0.5), floor(y + 0.5).
        source_index: (N,) int32 or int64, the source map that each target reads; None = its own, S == N. A CUDA index
            outside [0, S) reads nothing and gives zeros.
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        warped: (N, C, H, W) in the dtype and memory format of `features`.
        coverage: (N, H, W) float32, 1 where the source covers the cell, less at its border. No gradient.

    Raises:
        ValueError: a shape, size, mode, device or index does not fit, or `transform` requires grad.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    name = BEV_ARGUMENTS.operation
    height, width = _output_size(name, output_size, features)
    (features, transform, source_index), sizes = BEV_ARGUMENTS.check(features, transform, source_index)
    _check_values(name, mode, source_index, sizes)
    tensors = (features, transform, None, None, None, source_index)
    return OPERATION(backend, tensors, height, width, mode == "nearest", 0.0, name=name)


def _output_size(name, output_size, features):
    check_dense(name, "features", features)  # before its shape is read
    if output_size is None:
        return tuple(features.shape[2:]) if features.ndim == 4 else (0, 0)
    return check_size(name, "output_size", output_size)


def _check_values(name, mode, source_index, sizes):
    if source_index is None and sizes["S"] != sizes["N"]:
        sources, targets = sizes["S"], sizes["N"]
        raise ValueError(f"{name}: source_index is None with {sources} sources and {targets} targets, needs an index")
    if mode not in MODES:
        raise ValueError(f"{name}: mode is {mode!r}, needs one of {', '.join(MODES)}")
    may_be_none = source_index is not None and source_index.ndim == 2
    check_indices(name, "source_index", source_index, -1 if may_be_none else 0, sizes["S"])

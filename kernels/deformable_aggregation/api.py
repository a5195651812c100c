"""The public function."""

from collections.abc import Sequence

import torch

from ..runtime.arguments import Argument, Arguments, any_float, boolean, geometry
from ..runtime.checks import check_dtype
from . import ops

ARGUMENTS = Arguments(
    "deformable_aggregation",
    feature_maps=Argument((("B", "V", "C", "H_", "W_"),), any_float, gradient=True, many=True),
    points=Argument((("B", "A", "P", "V", 2),), geometry, gradient=True),
    weights=Argument((("B", "A", "P", "V", "levels", "groups"),), any_float, gradient=True),
    visible=Argument((("B", "V"),), boolean, optional=True),
    limits={"groups": (1, None)},
)
OPERATION = ops.register(ARGUMENTS)


def deformable_aggregation(
    feature_maps: Sequence[torch.Tensor],
    points: torch.Tensor,
    weights: torch.Tensor,
    *,
    visible: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Samples the maps of all cameras and scales at the keypoints of each anchor and sums the samples with weights.

    `out[b, a, c] = Σ over points p, cameras v, levels l: weights[b, a, p, v, l, group of c] · sample`, where the sample
    is bilinear with zeros outside the map at pixel = point · size − 0.5, so that (0, 0) is the image's corner and not
    the centre of its first cell. A point outside the open interval (0, 1), or NaN, counts nothing, and neither does one
    in a camera that is not visible: whatever the maps and weights hold there, neither values nor gradients get through.
    Sums are float32 (float64 if any input is), whatever the dtypes and under autocast too; bit for bit repeatable,
    gradients included.

    The view transform of Sparse4D and SparseDrive (Lin et al. 2022, Sun et al. 2024).

    Args:
        feature_maps: for each of one or more levels (B, V, C, H, W), any strides; channels_last is the fast layout. The
            levels have one dtype. Get gradients.
        points: (B, A, P, V, 2) float32, (x, y) of each of the P keypoints of each anchor in each camera, in [0, 1] of
            the image. Get gradients, to the right of a cell's centre at the centre itself.
        weights: (B, A, P, V, levels, groups) floating; C / groups consecutive channels share a weight. Get gradients.
        visible: (B, V) bool, False = this camera is not read. None = all are.
        backend: None or "auto", "torch", "triton", "definition".

    float64 maps take float64 points too.

    Returns:
        (B, A, C) in the dtype of the maps.

    Raises:
        ValueError: a shape or device does not fit, there is no level, or C is not a multiple of groups.
        TypeError: a dtype is not supported, or differs between levels.
        BackendError: the backend asked for cannot serve the call.
    """
    name, feature_maps = ARGUMENTS.operation, list(feature_maps)
    if not feature_maps:
        raise ValueError(f"{name}: feature_maps is empty, needs at least one level")
    table = ARGUMENTS.of_list(len(feature_maps))
    tensors, sizes = table.check(*feature_maps, points, weights, visible, levels=len(feature_maps))
    for level, maps in enumerate(feature_maps):
        check_dtype(name, f"feature_maps[{level}]", maps, (feature_maps[0].dtype,))
    if sizes["C"] % sizes["groups"]:
        raise ValueError(
            f"{name}: weights has {sizes['groups']} groups for C = {sizes['C']}, needs a divisor of C"
        )  # fmt: skip
    return OPERATION(backend, tensors)

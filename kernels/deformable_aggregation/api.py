"""The public function."""

from collections.abc import Sequence

import torch

from ..runtime.arguments import geometry
from ..runtime.backends import choose_backend
from ..runtime.checks import FLOAT_DTYPES, Shapes, check_dtype, check_same_device
from ..runtime.nvtx import annotate

NAME = "deformable_aggregation"


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
    feature_maps = list(feature_maps)
    _validate(feature_maps, points, weights, visible)
    with annotate(NAME):
        if backend == "definition":
            from .definition import deformable_aggregation as implementation

            return implementation(feature_maps, points, weights, visible)
        from .ops import deformable_aggregation as implementation

        chosen = choose_backend(backend, *feature_maps, points, weights, visible)
        return implementation(chosen, feature_maps, points, weights, visible)


def _validate(feature_maps, points, weights, visible):
    if not feature_maps:
        raise ValueError(f"{NAME}: feature_maps is empty, needs at least one level")
    shapes = Shapes(NAME, levels=len(feature_maps))
    for level, maps in enumerate(feature_maps):
        shapes.bind(f"feature_maps[{level}]", maps, "B", "V", "C", f"H{level}", f"W{level}")
    shapes.bind("points", points, "B", "A", "P", "V", 2)
    shapes.bind("weights", weights, "B", "A", "P", "V", "levels", "groups")
    if visible is not None:
        shapes.bind("visible", visible, "B", "V")
    channels, groups = shapes.sizes["C"], shapes.sizes["groups"]
    if groups == 0 or channels % groups:
        raise ValueError(f"{NAME}: weights has {groups} groups for C = {channels}, needs a divisor of C")
    first = feature_maps[0]
    check_dtype(NAME, "feature_maps[0]", first, FLOAT_DTYPES)
    for level, maps in enumerate(feature_maps):
        check_dtype(NAME, f"feature_maps[{level}]", maps, (first.dtype,))
    check_dtype(NAME, "points", points, geometry(first.dtype))
    check_dtype(NAME, "weights", weights, FLOAT_DTYPES)
    check_dtype(NAME, "visible", visible, (torch.bool,))
    levels = {f"feature_maps[{level}]": maps for level, maps in enumerate(feature_maps)}
    check_same_device(NAME, "feature_maps[0]", first, **levels, points=points, weights=weights, visible=visible)

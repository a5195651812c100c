"""deformable_aggregation and its peers."""

import torch

from ...kernels import deformable_aggregation
from ..operation import Inputs, Operation, require_cuda, require_package
from ..workload import Unavailable

_STRIDES = (4, 8, 16, 32)


def make_inputs(batch, anchors, points, cameras, channels, groups, height, width, *, dtype, device, generator):
    """Maps of a pyramid over images of height × width pixels; a fifth of all points is seen by a camera.

    No point is near a cell's border, where the derivative by it jumps and rounding decides on the side.
    """
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [
        torch.randn(batch * cameras, channels, height // stride, width // stride, generator=generator)
        .to(device, dtype, memory_format=torch.channels_last)
        .unflatten(0, (batch, cameras))
        for stride in _STRIDES
    ]
    places = torch.rand(batch, anchors, points, cameras, 2, generator=generator)
    seen = torch.rand(batch, anchors, points, cameras, generator=generator) < 0.2
    places = torch.where(seen[..., None], ((1024 * places).floor() + 0.5) / 1024, -1.0)
    scores = torch.randn(batch, anchors, points, cameras, len(maps), groups, generator=generator)
    weights = scores.flatten(2, 4).softmax(2).view_as(scores)
    levels = {f"level_{level}": level_maps for level, level_maps in enumerate(maps)}
    arguments = dict(points=places.to(device, geometry), weights=weights.to(device, dtype), **levels)
    grad = torch.randn(batch, anchors, channels, generator=generator).to(device, dtype)
    return Inputs(arguments, leaves=tuple(arguments), grad=grad)


def toolkit(points, weights, *feature_maps, backend=None):
    return deformable_aggregation(feature_maps, points, weights, backend=backend)


def deformops(inputs: Inputs):
    """Multi-scale deformable attention, which knows one camera."""
    if inputs.arguments["points"].shape[3] != 1:
        raise Unavailable("deformops samples one camera")
    require_package("deformops")
    require_cuda(inputs)
    from deformops.registry import msda

    sizes = [argument.shape[3:] for name, argument in inputs.arguments.items() if name.startswith("level_")]
    shapes = torch.tensor(sizes, device=inputs.device)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)

    def run(points, weights, *feature_maps):
        groups = weights.shape[5]
        value = torch.cat([level[:, 0].flatten(2).transpose(1, 2) for level in feature_maps], dim=1)
        weights = weights[:, :, :, 0].permute(0, 1, 4, 3, 2)  # (B, A, groups, levels, P)
        counts = ((points > 0) & (points < 1)).all(-1)[:, :, None, None, :, 0]
        weights = torch.where(counts, weights, 0)
        locations = points[:, :, None, None, :, 0].expand(*weights.shape, 2)
        return msda(value.unflatten(2, (groups, -1)), shapes, starts, locations, weights)

    return run


_UPSTREAM = dict(batch=1, anchors=900, points=13, cameras=6, channels=256, groups=8, height=256, width=704)
OPERATION = Operation(
    name="deformable_aggregation",
    cases={
        "small": {**_UPSTREAM, "anchors": 120, "channels": 64, "height": 128, "width": 352},
        "one-camera": {**_UPSTREAM, "cameras": 1},
        "upstream": _UPSTREAM,
        "upstream-map": {**_UPSTREAM, "anchors": 100, "points": 300},
        "tiny": dict(batch=1, anchors=3, points=4, cameras=2, channels=8, groups=2, height=64, width=96),
    },
    make_inputs=make_inputs,
    function=toolkit,
    peers=dict(deformops=deformops),  # eager is the definition: grid_sample, one level after another
    quick=("small",),
    heavy=("upstream", "upstream-map"),
    matter=("upstream",),
    axis="anchors",
)

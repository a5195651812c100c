"""multi_depth_warp and its peers."""

import torch

from ...kernels import multi_depth_warp
from ...modules.rig import nuscenes_like_rig, relative_projection
from ..cuda_warp import cuda_warp
from ..operation import Inputs, Operation
from ..peers import grid_sample_warp, source_locations
from ..workload import Unavailable

_DEPTHS = (10.0, 30.0)


def make_inputs(
    sources, targets, channels, height, width, stride, *, neighbours=False, dtype, device, generator
):  # fmt: skip
    """The rig of the built-in drive, half a second later and five metres on; random refinements of about a cell.

    neighbours: each target also reads the cameras before and after it, with weights of its own for each cell, source
        and depth, as temporal completion V3 does; else the mean over the depths of its own past.
    """
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    past_T_now = torch.eye(4, dtype=torch.float64)
    past_T_now[0, 3] = 5.0
    image_T_ego = nuscenes_like_rig().image_T_ego
    camera = torch.arange(targets) % len(image_T_ego)
    depths, hypotheses = torch.tensor(_DEPTHS), 1
    source = camera
    if neighbours:  # every depth of every source is a hypothesis
        source = (camera[:, None] + torch.tensor([0, -1, 1])).repeat_interleave(len(_DEPTHS), dim=1) % len(image_T_ego)
        depths, hypotheses = depths.repeat(3), source.shape[1]
        camera = camera[:, None].expand_as(source)
    projection = relative_projection(image_T_ego[camera], image_T_ego[source], past_T_now, stride=stride)
    offsets = torch.randn(targets, hypotheses, height, width, 2, generator=generator)
    features = torch.randn(sources, channels, height, width, generator=generator)
    grad = torch.randn(targets, channels, height, width, generator=generator)
    features, grad = (t.to(device, dtype, memory_format=torch.channels_last) for t in (features, grad))
    borders = near_borders(projection, depths, offsets)
    arguments = dict(
        features=features,
        projection=projection.to(device, geometry),
        depths=depths.to(device, geometry),
        offsets=offsets.to(device, geometry),
        source_index=(source if neighbours else torch.arange(targets) % sources).to(device),
    )
    if neighbours:
        scores = torch.randn(targets, hypotheses, height, width, generator=generator)
        arguments["weights"] = scores.softmax(dim=1).to(device, dtype)
    read = [features if neighbours else features[:targets], *list(arguments.values())[1:]]
    leaves = tuple(name for name in ("features", "offsets", "weights") if name in arguments)
    return Inputs(arguments, leaves, grad=grad, read=read, jumps=dict(offsets=borders.to(device)))


def near_borders(projection, depths, offsets):
    """Where rounding may decide in which cell a location lies, so that the gradient of its offset jumps.

    (N, D or 1, H, W, 2) bool, as `offsets`; x and y each for itself, for the gradient by one is continuous where the
    other crosses. A location in float32 is a few roundings of the sums that it is formed from away from the exact one.
    """
    exact, size = projection.double(), projection.abs().double()
    height, width = offsets.shape[2:4]
    near = torch.zeros(offsets.shape, dtype=torch.bool)
    for d in range(len(depths)):
        location, _ = source_locations(exact, depths.double(), d, height, width)
        largest, _ = source_locations(size, depths.double(), d, height, width)
        shared = min(d, offsets.shape[1] - 1)
        x = location + offsets[:, shared]
        rounding = 16 * torch.finfo(torch.float32).eps * (1 + largest + location.abs() + offsets[:, shared].abs())
        near[:, shared] |= (x - x.round()).abs() <= rounding
    return near


def toolkit(features, projection, depths, offsets, source_index, weights=None, *, backend=None):
    settings = dict(offsets=offsets, source_index=source_index, weights=weights)
    return multi_depth_warp(features, projection, depths, **settings, backend=backend)


def grid_sample(features, projection, depths, offsets, source_index, weights=None):
    settings = dict(offsets=offsets, source_index=source_index, weights=weights)
    return grid_sample_warp(features, projection, depths, **settings)


def cupy(inputs):
    if inputs.arguments["projection"].ndim == 4:
        raise Unavailable("the CUDA C++ kernel has one source for each target")
    return cuda_warp(inputs)


_DOCUMENTS = dict(sources=6, targets=3, channels=256, height=28, width=50, stride=32)
OPERATION = Operation(
    name="multi_depth_warp",
    cases={
        "documents": _DOCUMENTS,
        "documents-neighbours": {**_DOCUMENTS, "neighbours": True},
        "documents-all-cameras": {**_DOCUMENTS, "targets": 6},
        "half-stride": {**_DOCUMENTS, "height": 56, "width": 100, "stride": 16},
        "fine": {**_DOCUMENTS, "height": 112, "width": 200, "stride": 8},
        "tiny": {**_DOCUMENTS, "channels": 8, "height": 4, "width": 6, "stride": 256},
        "tiny-neighbours": {**_DOCUMENTS, "channels": 8, "height": 4, "width": 6, "stride": 256, "neighbours": True},
    },
    make_inputs=make_inputs,
    function=toolkit,
    peers=dict(grid_sample=lambda inputs: grid_sample, cupy=cupy),
    quick=("documents", "half-stride"),
    matter=("documents", "fine"),
)

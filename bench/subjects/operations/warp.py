"""multi_depth_warp, bev_warp and their peers."""

import torch

from ....kernels import bev_warp, multi_depth_warp
from ....modules.rig import nuscenes_like_rig, relative_projection
from ...eager import eager_bev_warp, eager_warp
from .cuda_warp import cuda_warp
from .operation import Inputs, Operation

_DEPTHS = (10.0, 30.0)


def make_inputs(sources, targets, channels, height, width, stride, *, dtype, device, generator):
    """The rig of the built-in drive, half a second later and five metres on; random refinements of about a cell."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    past_T_now = torch.eye(4, dtype=torch.float64)
    past_T_now[0, 3] = 5.0
    image_T_ego = nuscenes_like_rig().image_T_ego
    camera = torch.arange(targets) % len(image_T_ego)
    projection = relative_projection(image_T_ego[camera], image_T_ego[camera], past_T_now, stride=stride)
    offsets = torch.randn(targets, 1, height, width, 2, generator=generator)
    features = torch.randn(sources, channels, height, width, generator=generator)
    grad = torch.randn(targets, channels, height, width, generator=generator)
    features, grad = (t.to(device, dtype, memory_format=torch.channels_last) for t in (features, grad))
    arguments = dict(
        features=features,
        projection=projection.to(device, geometry),
        depths=torch.tensor(_DEPTHS, device=device, dtype=geometry),
        offsets=offsets.to(device, geometry),
        source_index=(torch.arange(targets) % sources).to(device),
    )
    read = [features[:targets], arguments["projection"], arguments["offsets"]]
    return Inputs(arguments, leaves=("features", "offsets"), grad=grad, read=read)


def toolkit(features, projection, depths, offsets, source_index):
    return multi_depth_warp(features, projection, depths, offsets=offsets, source_index=source_index)


def eager(features, projection, depths, offsets, source_index):
    return eager_warp(features, projection, depths, offsets=offsets, source_index=source_index)


def make_bev_inputs(maps, channels, height, width, *, dtype, device, generator):
    """A turn of a few degrees and a shift of a few cells."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    angle = 0.1 * torch.rand(maps, generator=generator) - 0.05
    shift = 8 * torch.rand(maps, 2, generator=generator) - 4
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    features, grad = (
        torch.randn(maps, channels, height, width, generator=generator).to(
            device, dtype, memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    arguments = dict(features=features, transform=rows.to(device, geometry))
    return Inputs(arguments, leaves=("features",), grad=grad)


_DOCUMENTS = dict(sources=6, targets=3, channels=256, height=28, width=50, stride=32)
MULTI_DEPTH_WARP = Operation(
    name="multi_depth_warp",
    cases={
        "documents": _DOCUMENTS,
        "documents-all-cameras": {**_DOCUMENTS, "targets": 6},
        "half-stride": {**_DOCUMENTS, "height": 56, "width": 100, "stride": 16},
        "fine": {**_DOCUMENTS, "height": 112, "width": 200, "stride": 8},
        "tiny": {**_DOCUMENTS, "channels": 8, "height": 4, "width": 6, "stride": 256},
    },
    make_inputs=make_inputs,
    function=toolkit,
    eager=eager,
    peers=dict(cupy=cuda_warp),
    quick=("documents", "half-stride"),
)

_BEV = dict(maps=1, channels=128, height=56, width=104)
BEV_WARP = Operation(
    name="bev_warp",
    cases={
        "static-bev": _BEV,
        "static-bev-b4": {**_BEV, "maps": 4},
        "static-bev-b16": {**_BEV, "maps": 16},
        "tiny": {**_BEV, "channels": 8, "height": 4, "width": 6},
    },
    make_inputs=make_bev_inputs,
    function=bev_warp,
    eager=eager_bev_warp,
    quick=("static-bev",),
    axis="maps",
)

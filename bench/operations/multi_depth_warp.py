"""multi_depth_warp and its peers."""

import torch

from ...kernels import multi_depth_warp
from ...modules.rig import nuscenes_like_rig, relative_projection
from ..cuda_warp import cuda_warp
from ..operation import Inputs, Operation
from ..peers import grid_sample_warp

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


def toolkit(features, projection, depths, offsets, source_index, *, backend=None):
    return multi_depth_warp(features, projection, depths, offsets=offsets, source_index=source_index, backend=backend)


def grid_sample(features, projection, depths, offsets, source_index):
    return grid_sample_warp(features, projection, depths, offsets=offsets, source_index=source_index)


_DOCUMENTS = dict(sources=6, targets=3, channels=256, height=28, width=50, stride=32)
OPERATION = Operation(
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
    peers=dict(grid_sample=lambda inputs: grid_sample, cupy=cuda_warp),
    quick=("documents", "half-stride"),
    matter=("documents", "fine"),
)

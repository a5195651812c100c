"""bev_warp and its peers."""

import torch

from ...kernels import bev_warp
from ..operation import Inputs, Operation
from ..peers import grid_sample_bev_warp


def make_inputs(maps, channels, height, width, *, dtype, device, generator):
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


_MAP = dict(maps=1, channels=128, height=56, width=104)
OPERATION = Operation(
    name="bev_warp",
    cases={
        "static-bev": _MAP,
        "static-bev-b4": {**_MAP, "maps": 4},
        "static-bev-b16": {**_MAP, "maps": 16},
        "tiny": {**_MAP, "channels": 8, "height": 4, "width": 6},
    },
    make_inputs=make_inputs,
    function=bev_warp,
    peers=dict(grid_sample=lambda inputs: grid_sample_bev_warp),
    quick=("static-bev",),
    matter=("static-bev-b16",),
    axis="maps",
)

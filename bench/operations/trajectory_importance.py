"""trajectory_importance and its peers. It has no gradients."""

import torch

from ...kernels import trajectory_importance
from ..operation import Inputs, Operation

SIGMA = 3.0


def make_inputs(images, steps, height, width, *, dtype, device, generator):
    """Trajectories that wander over the map. Points are geometry, so float32 in every run but the reference's."""
    scale = torch.tensor([width, height])
    points = (torch.rand(images, steps, 2, generator=generator) * scale).to(device)
    points = points.double() if dtype == torch.float64 else points
    valid = (torch.rand(images, steps, generator=generator) < 0.9).to(device)
    result = torch.zeros(images, height, width, device=device)
    return Inputs(dict(points=points, valid=valid, like=result), leaves=(), grad=result, read=[points, valid])


def toolkit(points, valid, like, *, backend=None):
    return trajectory_importance(points, valid, tuple(like.shape[1:]), sigma=SIGMA, backend=backend)


OPERATION = Operation(
    name="trajectory_importance",
    cases={
        "documents": dict(images=6, steps=12, height=28, width=50),
        "documents-fine": dict(images=6, steps=12, height=112, width=200),
        "batch-8": dict(images=48, steps=12, height=112, width=200),
        "tiny": dict(images=2, steps=4, height=4, width=6),
    },
    make_inputs=make_inputs,
    function=toolkit,
    quick=("documents", "documents-fine"),
    matter=("batch-8",),
)

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


def eager(points, valid, like):
    """Every segment against every cell at once."""
    height, width = like.shape[1:]
    number = torch.arange(points.shape[1], device=points.device).expand_as(valid)
    last = torch.where(valid, number, -1).cummax(dim=1).values  # the latest valid point up to each
    before = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)
    before = torch.where(before >= 0, before, number)
    start = points.gather(1, before[..., None].expand_as(points))[:, :, None, None]
    along = points[:, :, None, None] - start
    y, x = (torch.arange(n, dtype=points.dtype, device=points.device) for n in (height, width))
    to_cell = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) - start  # (N, T, H, W, 2)
    length = along.square().sum(-1)
    fraction = ((to_cell * along).sum(-1) / length.where(length > 0, torch.ones_like(length))).clamp(0, 1)
    distance = (to_cell - fraction[..., None] * along).square().sum(-1)
    nearest = distance.masked_fill(~valid[:, :, None, None], float("inf")).amin(dim=1)
    return torch.exp(-nearest / (2 * SIGMA**2)).float()


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
    eager=eager,
    quick=("documents", "documents-fine"),
    matter=("batch-8",),
)

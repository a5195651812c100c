"""The fast plain PyTorch backend: one segment at a time, so memory does not grow with the trajectory."""

import torch

QUARTER = 0.25  # of everything, so that no difference of finite numbers overflows


def forward(points, valid, height, width, sigma):
    valid = valid & points.isfinite().all(dim=-1)
    points = QUARTER * torch.where(valid[..., None], points, 0)
    y = torch.arange(height, dtype=points.dtype, device=points.device)
    x = torch.arange(width, dtype=points.dtype, device=points.device)
    cells = QUARTER * torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)

    nearest = points.new_full((points.shape[0], height, width), torch.inf)
    start, started = points.new_zeros(points.shape[0], 2), valid.new_zeros(points.shape[0])
    for step in range(points.shape[1]):
        end = points[:, step]
        start = torch.where(started[:, None], start, end)
        distance = _squared_distance(cells, start, end, QUARTER * sigma)
        nearest = torch.where(valid[:, step, None, None], torch.minimum(nearest, distance), nearest)
        start = torch.where(valid[:, step, None], end, start)
        started = started | valid[:, step]
    return torch.exp(-0.5 * nearest).float()


def _squared_distance(cells, start, end, sigma):
    """(N, H, W) squared distance in sigmas of each cell (H, W, 2) from the segments `start` to `end`, (N, 2) each."""
    reach = (end - start).abs().amax(-1)  # (N,)
    direction = ((end - start) / torch.where(reach > 0, reach, 1)[:, None])[:, None, None]
    to_cell = cells - start[:, None, None]
    squared_length = direction.square().sum(-1)
    along = (to_cell * direction).sum(-1) / torch.where(squared_length > 0, squared_length, 1)
    along = along.clamp(min=0).minimum(reach[:, None, None])
    return ((to_cell - along[..., None] * direction) / sigma).square().sum(-1)

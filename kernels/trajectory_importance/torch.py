"""The mathematics in plain PyTorch."""

import torch


def trajectory_importance(points, valid, height, width, sigma):
    steps = points.shape[1]
    valid = valid & points.isfinite().all(dim=-1)
    points = torch.where(valid[..., None], points, 0)
    y = torch.arange(height, dtype=points.dtype, device=points.device)
    x = torch.arange(width, dtype=points.dtype, device=points.device)
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)

    nearest = points.new_full((points.shape[0], height, width), torch.inf)
    start, started = points.new_zeros(points.shape[0], 2), valid.new_zeros(points.shape[0])
    for step in range(steps):  # one segment at a time: memory does not grow with the trajectory
        end = points[:, step]
        start = torch.where(started[:, None], start, end)
        distance = _squared_distance(cells, start, end)
        nearest = torch.where(valid[:, step, None, None], torch.minimum(nearest, distance), nearest)
        start = torch.where(valid[:, step, None], end, start)
        started = started | valid[:, step]
    return torch.exp(nearest * (-0.5 / sigma**2)).float()


def _squared_distance(cells, start, end):
    """(N, H, W) squared distance of each cell (H, W, 2) from the segments `start` to `end`, (N, 2) each."""
    along = (end - start)[:, None, None]
    to_cell = cells - start[:, None, None]
    length = along.square().sum(-1)
    fraction = ((to_cell * along).sum(-1) / torch.where(length > 0, length, 1)).clamp(0, 1)
    return (to_cell - fraction[..., None] * along).square().sum(-1)

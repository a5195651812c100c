"""The mathematics, as it is written down: every segment against every cell at once."""

import torch


def forward(points, valid, height, width, sigma):
    if points.shape[1] == 0:
        return points.new_zeros(len(points), height, width).float()
    valid = valid & points.isfinite().all(dim=-1)
    number = torch.arange(points.shape[1], device=points.device).expand_as(valid)
    last = torch.where(valid, number, -1).cummax(dim=1).values  # (N, T), the latest valid point up to each
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    before = torch.where(before >= 0, before, number)  # a first point is its own predecessor
    y, x = (torch.arange(n, dtype=points.dtype, device=points.device) for n in (height, width))
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)

    quarter = 0.25  # of everything, so that no difference of finite numbers overflows
    end = quarter * torch.where(valid[..., None], points, 0)[:, :, None, None]  # (N, T, 1, 1, 2)
    start = end.gather(1, before[..., None, None, None].expand_as(end))
    to_cell = quarter * cells - start  # (N, T, H, W, 2)
    reach = (end - start).abs().amax(-1, keepdim=True)
    direction = (end - start) / torch.where(reach > 0, reach, 1)
    squared_length = direction.square().sum(-1, keepdim=True)
    along = (to_cell * direction).sum(-1, keepdim=True) / torch.where(squared_length > 0, squared_length, 1)
    away = to_cell - along.clamp(min=0).minimum(reach) * direction
    distance = (away / (quarter * sigma)).square().sum(-1)  # in sigmas, squared
    nearest = distance.masked_fill(~valid[:, :, None, None], torch.inf).amin(dim=1)
    return torch.exp(-0.5 * nearest).float()

"""`multi_depth_warp` with a source and a projection for each hypothesis, in plain PyTorch."""

import torch
import torch.nn.functional as F


def warp_many(features, projection, depths, *, weights, source_index, output_size, backend=None):
    """See `multi_depth_warp`: features (S, C, Hs, Ws), projection (N, D, 3, 4), depths (D,), weights (N, D, H, W),
    source_index (N, D); returns the warped maps (N, C, H, W) and their coverage (N, H, W)."""
    sources, channels, source_height, source_width = features.shape
    height, width = output_size
    v, u = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32, device=features.device) for n in output_size), indexing="ij"
    )
    entry = projection[..., None, None]
    x, y, z = ((entry[:, :, i, 0] * u + entry[:, :, i, 1] * v + entry[:, :, i, 2]) for i in range(3))
    x, y, z = (p * depths[:, None, None] + entry[:, :, i, 3] for i, p in enumerate((x, y, z)))
    x, y = x / z, y / z
    left, top = x.floor(), y.floor()
    usable = (z > 0.1) & (left >= -1) & (left < source_width) & (top >= -1) & (top < source_height)
    usable = usable & (source_index >= 0)[:, :, None, None] & (weights.detach() != 0)

    n, d, row, column = usable.nonzero().unbind(1)
    order = (n * height + row) * width + column
    by_cell = order.argsort(stable=True)
    n, d, row, column, order = (t[by_cell] for t in (n, d, row, column, order))
    at = (n, d, row, column)
    left, top = left[at].long(), top[at].long()
    fx, fy = x[at] - left, y[at] - top
    columns = torch.stack([left, left + 1, left, left + 1], 1)
    rows = torch.stack([top, top, top + 1, top + 1], 1)
    share = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], 1)
    inside = (columns >= 0) & (columns < source_width) & (rows >= 0) & (rows < source_height)
    share = torch.where(inside, share, 0)
    cell = (source_index[n, d][:, None] * source_height + rows) * source_width + columns
    cell = torch.where(inside, cell, 0)
    weight = share * weights[at][:, None].float()

    bags = len(projection) * height * width
    table = features.permute(0, 2, 3, 1).reshape(-1, channels).float()
    counts = torch.bincount(order, minlength=bags) * 4
    offsets = counts.cumsum(0) - counts
    warped = F.embedding_bag(cell.flatten(), table, offsets, mode="sum", per_sample_weights=weight.flatten())
    coverage = torch.zeros(bags, device=features.device).index_add_(0, order, weight.detach().sum(1))
    warped = warped.to(features.dtype).reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    return warped, coverage.reshape(-1, height, width)

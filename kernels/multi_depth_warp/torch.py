"""The fast plain PyTorch backend, differentiated by autograd.

The maps are one table of rows, a row for each source cell; a target cell is a bag of weighted rows. So no plane is ever
stored, and the gradients of weights and offsets pass through the weights of the rows.
"""

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype, memory_format

OUTSIDE = -2  # a coordinate whose neighbour is outside too


def forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    sources, channels, source_height, source_width = features.shape
    targets = projection.shape[0]
    floats = [t for t in (features, projection, depths, weights, offsets) if t is not None]
    dtype = accumulator_dtype(*(t.dtype for t in floats))

    x, y, in_front = _locate(projection.to(dtype), depths, offsets, height, width, min_depth)
    shift = 0.5 if nearest else 0.0
    left, top = torch.floor(x + shift), torch.floor(y + shift)
    if source_index is None:
        source_index = torch.arange(targets, device=features.device)
    source = source_index if source_index.ndim == 2 else source_index[:, None]
    source = source.long()[:, None, None]  # (N, 1, 1, 1 or D)
    # Tested as floats: what is NaN or huge never becomes an integer.
    inside = in_front & (source >= 0) & (source < sources)
    inside = inside & (left >= -1) & (left < source_width) & (top >= -1) & (top < source_height)
    x, y, left, top = (torch.where(inside, t, OUTSIDE) for t in (x, y, left, top))
    column, row, share = _corners(x, y, left, top, nearest)

    inside = (column >= 0) & (column < source_width) & (row >= 0) & (row < source_height)
    nothing = sources * source_height * source_width
    index = torch.where(inside, (source[..., None] * source_height + row) * source_width + column, nothing)
    weight = share / share.shape[3] if weights is None else share * weights.to(dtype).permute(0, 2, 3, 1)[..., None]
    weight = torch.where(inside, weight, 0)

    table = features.permute(0, 2, 3, 1).reshape(nothing, channels).to(dtype)
    table = torch.cat([table, table.new_zeros(1, channels)])
    bags = (targets * height * width, share.shape[3] * share.shape[4])
    index, share = index.reshape(bags), weight.reshape(bags)
    if channels == 0:  # which embedding_bag refuses
        warped = share.sum(1, keepdim=True) * table.sum(0)
    else:
        warped = F.embedding_bag(index, table, mode="sum", per_sample_weights=share)
    warped = warped.to(features.dtype).reshape(targets, height, width, channels).permute(0, 3, 1, 2)
    coverage = weight.detach().sum((3, 4)).float()
    return warped.contiguous(memory_format=memory_format(features)), coverage


def _locate(projection, depths, offsets, height, width, min_depth):
    """Source locations x, y (N, H, W, D), and where they are beyond `min_depth`."""
    u = torch.arange(width, dtype=projection.dtype, device=projection.device)[:, None]
    v = torch.arange(height, dtype=projection.dtype, device=projection.device)[:, None, None]
    entry = projection.movedim(1, -1) if projection.ndim == 4 else projection[..., None]
    entry = entry[:, :, :, None, None]  # (N, rows, columns, 1, 1, 1 or D)
    p = entry[:, :, 0] * u + entry[:, :, 1] * v + entry[:, :, 2]  # (N, rows, H, W, 1 or D)
    if depths is None:
        x, y = p.unbind(1)
        return x, y, torch.ones_like(x, dtype=torch.bool)
    depths = depths.to(projection.dtype).expand(projection.shape[0], -1)
    p = p * depths[:, None, None, None] + entry[:, :, 3]
    x, y = p[:, 0] / p[:, 2], p[:, 1] / p[:, 2]
    if offsets is not None:
        offset_x, offset_y = offsets.to(x.dtype).permute(0, 2, 3, 1, 4).unbind(-1)
        x, y = x + offset_x, y + offset_y
    return x, y, p[:, 2] > min_depth


def _corners(x, y, left, top, nearest):
    """Columns and rows (int64) of the cells that a location touches, and their shares: each (N, H, W, D, 1 or 4)."""
    column, row = left.long(), top.long()
    if nearest:
        share = torch.ones_like(x) + 0 * x  # connected, so that the offsets get zeros as their gradient
        return column[..., None], row[..., None], share[..., None]
    fx, fy = x - left.detach(), y - top.detach()
    columns = torch.stack([column, column + 1, column, column + 1], -1)
    rows = torch.stack([row, row, row + 1, row + 1], -1)
    shares = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], -1)
    return columns, rows, shares

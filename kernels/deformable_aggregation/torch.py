"""Plain PyTorch backend: only what counts is sampled, and nothing as large as the samples is ever stored.

The maps of a level are one table of rows, one row for each cell and group; an anchor is a bag of weighted rows, so the
forward pass is a sparse product. The gradient of the maps is the transposed product: one stable sort of the corners by
cell, shared by the groups, makes each cell a bag of rows of the incoming gradient. No sum depends on threads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype

_CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (x, y) beyond the top left cell that a location touches


class _Samples(NamedTuple):
    """The n points that count, in the order of anchors."""

    flat: torch.Tensor  # (n,) int64, place in (B, A, P, V)
    anchor: torch.Tensor  # (n,) int64, place in (B, A), ascending
    camera: torch.Tensor  # (n,) int64, place in (B, V)
    location: torch.Tensor  # (n, 2), x and y in [0, 1] of the image


class _Corners(NamedTuple):
    cell: torch.Tensor  # (n, 4) int64, place in (B, V, H, W); of a corner outside, its neighbour inside
    inside: torch.Tensor  # (n, 4) bool
    share: torch.Tensor  # (n, 4), zero outside
    slope_x: torch.Tensor  # (n, 4), of the share by the location's x in [0, 1]; zero outside
    slope_y: torch.Tensor  # (n, 4)


def forward(feature_maps, points, weights, visible):
    batch, anchors = points.shape[:2]
    first, groups = feature_maps[0], weights.shape[5]
    dtype = _dtype(feature_maps, points, weights)
    out = torch.zeros(batch * anchors, first.shape[2], dtype=dtype, device=first.device)
    samples = _samples(points, visible, dtype)
    if out.numel() and len(samples.flat):
        starts = 4 * torch.searchsorted(samples.anchor, torch.arange(len(out), device=out.device))
        all_weights = weights.flatten(0, 3)
        for level, maps in enumerate(feature_maps):
            if maps.numel() == 0:
                continue
            corners, table = _corners(samples, maps), _table(maps, groups, dtype)
            weight = all_weights[samples.flat, level].to(dtype)  # (n, groups)
            index = corners.cell.flatten() * groups
            shares = [(corners.share * weight[:, group, None]).flatten() for group in range(groups)]
            out += torch.cat([_bags(table, index + g, starts, share) for g, share in enumerate(shares)], dim=1)
    return out.to(first.dtype).unflatten(0, (batch, anchors))


def backward(grad, feature_maps, points, weights, visible, needs_grad):
    """The gradients of the maps, the points and the weights; of the maps those that `needs_grad` (levels + 2) wants."""
    groups = weights.shape[5]
    dtype = _dtype(feature_maps, points, weights)
    grad = grad.flatten(0, 1).to(dtype)
    samples = _samples(points, visible, dtype)
    nothing = len(samples.flat) == 0 or grad.numel() == 0
    dmaps = [
        torch.zeros_like(maps) if nothing or maps.numel() == 0 else torch.empty_like(maps) for maps in feature_maps
    ]
    dlocation = torch.zeros_like(samples.location)
    dweights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    all_weights = weights.flatten(0, 3)
    for level, maps in enumerate(feature_maps):
        if nothing or maps.numel() == 0:
            continue
        corners = _corners(samples, maps)
        weight = all_weights[samples.flat, level].to(dtype)  # (n, groups)
        if needs_grad[level]:
            _backward_maps(dmaps[level], grad, samples, corners, weight)
        if any(needs_grad[-2:]):
            dots = _dots(grad, _table(maps, groups, dtype), samples, corners, groups)  # (n, 4, groups)
            dweight = (corners.share[..., None] * dots).sum(1)
            dweights.view(-1, *weights.shape[4:])[samples.flat, level] = dweight.to(weights.dtype)
            by_share = (dots * weight[:, None]).sum(2)  # (n, 4)
            dlocation[:, 0] += (corners.slope_x * by_share).sum(1)
            dlocation[:, 1] += (corners.slope_y * by_share).sum(1)
    dpoints = torch.zeros_like(points, memory_format=torch.contiguous_format)
    dpoints.view(-1, 2)[samples.flat] = dlocation.to(points.dtype)
    return [*dmaps, dpoints, dweights]


def _dtype(feature_maps, points, weights):
    return accumulator_dtype(feature_maps[0].dtype, points.dtype, weights.dtype)


def _samples(points, visible, dtype):
    batch, anchors, per_anchor, cameras = points.shape[:4]
    counts = ((points > 0) & (points < 1)).all(-1)
    if visible is not None:
        counts = counts & visible[:, None, None]
    flat = counts.flatten().nonzero()[:, 0]
    anchor = flat // max(per_anchor * cameras, 1)
    camera = anchor // max(anchors, 1) * cameras + flat % max(cameras, 1)
    return _Samples(flat, anchor, camera, points.reshape(-1, 2)[flat].to(dtype))


def _corners(samples, maps):
    height, width = maps.shape[3:]
    x, y = samples.location[:, 0] * width - 0.5, samples.location[:, 1] * height - 0.5
    left, top = torch.floor(x), torch.floor(y)
    fx, fy = x - left, y - top
    share_x, share_y = (1 - fx, fx), (1 - fy, fy)
    cells = []
    for right, down in _CORNERS:
        column, row = left.long() + right, top.long() + down
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        cell = (samples.camera * height + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
        sign_x, sign_y = 2 * right - 1, 2 * down - 1
        numbers = share_x[right] * share_y[down], sign_x * width * share_y[down], sign_y * height * share_x[right]
        cells.append([cell, inside, *(torch.where(inside, number, 0) for number in numbers)])
    return _Corners(*(torch.stack(column, dim=1) for column in zip(*cells)))


def _table(maps, groups, dtype):
    """(B, V, C, H, W) → (B·V·H·W·groups, C / groups), one row for each cell and group."""
    return maps.permute(0, 1, 3, 4, 2).to(dtype).reshape(-1, maps.shape[2] // groups)


def _bags(table, index, starts, share):
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=share)


def _dots(grad, table, samples, corners, groups):
    """Of the incoming gradient and each corner's features, by group: (n, 4, groups)."""
    bag = samples.anchor[:, None].expand(-1, 4).flatten()
    index = corners.cell.flatten() * groups
    none = index.new_empty(0)
    dots = [
        torch.ops.aten._embedding_bag_per_sample_weights_backward(
            columns.contiguous(), table, index + group, none, bag, 0
        )
        for group, columns in enumerate(grad.chunk(groups, dim=1))
    ]
    return torch.where(corners.inside[..., None], torch.stack(dots, dim=-1).unflatten(0, (-1, 4)), 0)


def _backward_maps(dmaps, grad, samples, corners, weight):
    """Fills `dmaps` (B, V, C, H, W)."""
    cells = dmaps.permute(0, 1, 3, 4, 2)
    count = cells[..., 0].numel()
    inside = corners.inside.flatten().nonzero()[:, 0]
    cell, order = corners.cell.flatten()[inside].sort(stable=True)
    sample = inside[order] // 4
    anchor = samples.anchor[sample]
    starts = torch.searchsorted(cell, torch.arange(count, device=cell.device))
    share = corners.share.flatten()[inside[order]]
    groups = weight.shape[1]
    for group, (target, columns) in enumerate(zip(cells.chunk(groups, dim=-1), grad.chunk(groups, dim=1))):
        bags = _bags(columns.contiguous(), anchor, starts, share * weight[sample, group])
        target.copy_(bags.view(target.shape))

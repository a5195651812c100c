"""The fast plain PyTorch backend: only what a source sees is looked up, and no plane is ever stored.

The maps are one table of rows, a row for each source cell; a target cell is a bag of weighted rows, those of the
hypotheses that lie inside their source. The gradient of the maps is the transposed product: one stable sort of the
corners by source cell makes each of them a bag of rows of the incoming gradient. Nothing but the inputs is kept for it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype, memory_format

_NEAREST = ((0, 0),)
_BILINEAR = ((0, 0), (1, 0), (0, 1), (1, 1))  # (x, y) beyond the top left cell that a location touches


class _Found(NamedTuple):
    """The n hypotheses that lie inside their source, target cell by target cell."""

    flat: torch.Tensor  # (n,) int64, place in (N, H, W, D), ascending
    depths: int  # D
    cell: torch.Tensor  # (n, corners) int64, place in (S, Hs, Ws); of a corner outside, its neighbour inside
    inside: torch.Tensor  # (n, corners) bool
    share: torch.Tensor  # (n, corners), zero outside
    slope_x: torch.Tensor  # (n, corners), of the share by x; zero outside
    slope_y: torch.Tensor  # (n, corners)

    @property
    def target(self):
        """(n,) int64, place in (N, H, W)."""
        return self.flat // self.depths


def forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    targets, channels = len(projection), features.shape[1]
    dtype = _dtype(features, projection, depths, weights, offsets)
    found = _find(features, projection, depths, offsets, source_index, height, width, nearest, min_depth, dtype)
    weight = found.share * _weight(weights, found, dtype)
    cells = targets * height * width
    if channels and len(found.flat):
        starts = _starts(found.target, cells) * found.cell.shape[1]
        warped = _bags(_rows(features, dtype), found.cell.flatten(), starts, weight.flatten())
    else:
        warped = weight.new_zeros(cells, channels)
    covered = weight.new_zeros(cells * found.depths)
    covered[found.flat] = weight.sum(1)
    warped = warped.to(features.dtype).reshape(targets, height, width, channels).permute(0, 3, 1, 2)
    coverage = covered.view(targets, height, width, found.depths).sum(-1).float()
    return warped.contiguous(memory_format=memory_format(features)), coverage


def backward(
    grad, features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth, needs_grad
):  # fmt: skip
    """The gradients of the features, the weights and the offsets that `needs_grad` wants."""
    dtype = _dtype(features, projection, depths, weights, offsets)
    found = _find(features, projection, depths, offsets, source_index, height, width, nearest, min_depth, dtype)
    rows, weight = _rows(grad, dtype), _weight(weights, found, dtype)
    dfeatures = dweights = doffsets = None
    if needs_grad[0]:
        dfeatures = _backward_features(features, rows, found, weight)
    if any(needs_grad[1:]):
        shape, empty = (len(projection), height, width, found.depths), not (len(found.flat) and grad.shape[1])
        dots = torch.zeros_like(found.share) if empty else _dots(rows, _rows(features, dtype), found)
        nothing = grad.new_zeros(math.prod(shape), dtype=dtype)

        def spread(values):  # not by `put_`, which torch.use_deterministic_algorithms refuses
            return nothing.index_copy(0, found.flat, values).view(shape).movedim(-1, 1)

        if needs_grad[1]:
            dweights = torch.empty_like(weights).copy_(spread((found.share * dots).sum(1)))
        if needs_grad[2]:
            dots = dots * weight
            slopes = (found.slope_x, found.slope_y)
            doffsets = torch.stack([spread((slope * dots).sum(1)) for slope in slopes], dim=-1)
            if offsets.shape[1] != found.depths:
                doffsets = doffsets.sum(1, keepdim=True)
            doffsets = torch.empty_like(offsets).copy_(doffsets)
    return [dfeatures, dweights, doffsets]


def _dtype(*tensors):
    return accumulator_dtype(*(t.dtype for t in tensors if t is not None))


def _rows(maps, dtype):
    """(N, C, H, W) → (N·H·W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)


def _weight(weights, found, dtype):
    """What each of the n counts, (n, 1)."""
    if weights is None:
        return found.share.new_full((len(found.flat), 1), 1 / found.depths)
    return weights.permute(0, 2, 3, 1).reshape(-1)[found.flat].to(dtype)[:, None]


def _starts(places, count):
    """Where each of `count` bags begins in the ascending `places`."""
    return torch.searchsorted(places, torch.arange(count, device=places.device))


def _bags(table, index, starts, share):
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=share)


def _backward_features(features, rows, found, weight):
    inside, strides = found.inside.flatten().nonzero()[:, 0], torch.empty_like(features).stride()
    if not (len(inside) and features.shape[1]):
        return torch.zeros_like(features)
    cell, order = found.cell.flatten()[inside].sort(stable=True)
    inside = inside[order]
    target, share = found.target[inside // found.cell.shape[1]], (found.share * weight).flatten()[inside]
    sources, channels, height, width = features.shape
    bags = _bags(rows, target, _starts(cell, sources * height * width), share).to(features.dtype)
    dfeatures = bags.view(sources, height, width, channels).permute(0, 3, 1, 2)
    return dfeatures if dfeatures.stride() == strides else torch.empty_like(features).copy_(dfeatures)


def _dots(rows, table, found):
    """Of the incoming gradient and each corner's features, (n, corners)."""
    bag, none = found.target[:, None].expand_as(found.cell).flatten(), found.flat[:0]
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table, found.cell.flatten(), none, bag, 0)
    return torch.where(found.inside, dots.view_as(found.share), 0)


def _find(features, projection, depths, offsets, source_index, height, width, nearest, min_depth, dtype):
    sources, _, source_height, source_width = features.shape
    x, y, counts = _locate(projection.to(dtype), depths, offsets, height, width, min_depth)
    if nearest:
        x, y = torch.floor(x + 0.5), torch.floor(y + 0.5)
    if source_index is None:
        source_index = torch.arange(len(projection), device=features.device)
    source = source_index if source_index.ndim == 2 else source_index[:, None]
    source = source[:, None, None].expand_as(x)
    # Tested as floats: what is NaN or huge never becomes an integer.
    low = 0 if nearest else -1
    counts = counts & (source >= 0) & (source < (sources if source_height * source_width else 0))
    counts &= (x >= low) & (x < source_width) & (y >= low) & (y < source_height)
    flat = counts.flatten().nonzero()[:, 0]
    x, y, source = (t.reshape(-1)[flat] for t in (x, y, source))
    left, top = torch.floor(x), torch.floor(y)
    fx, fy = x - left, y - top
    source, left, top = source.long() * source_height, left.long(), top.long()
    share_x, share_y, corners = (1 - fx, fx), (1 - fy, fy), []
    for right, down in _NEAREST if nearest else _BILINEAR:
        column, row = left + right, top + down
        inside = (column >= 0) & (column < source_width) & (row >= 0) & (row < source_height)
        cell = (source + row.clamp(0, source_height - 1)) * source_width + column.clamp(0, source_width - 1)
        slopes = (0 * fx, 0 * fy) if nearest else ((2 * right - 1) * share_y[down], (2 * down - 1) * share_x[right])
        numbers = share_x[right] * share_y[down], *slopes
        corners.append([cell, inside, *(torch.where(inside, number, 0) for number in numbers)])
    return _Found(flat, counts.shape[-1], *(torch.stack(column, dim=1) for column in zip(*corners)))


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

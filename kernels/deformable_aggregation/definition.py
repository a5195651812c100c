"""The mathematics, one level at a time: any float dtype, any device, differentiated by autograd."""

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype


def forward(feature_maps, points, weights, visible):
    batch, anchors, per_anchor, cameras = points.shape[:4]
    channels, groups = feature_maps[0].shape[2], weights.shape[5]
    dtype = accumulator_dtype(points.dtype, weights.dtype, *(maps.dtype for maps in feature_maps))
    counts = ((points > 0) & (points < 1)).all(-1)  # (B, A, P, V); false for NaN
    if visible is not None:
        counts = counts & visible[:, None, None]
    grid = 2 * torch.where(counts[..., None], points, 0.5).to(dtype) - 1
    grid = grid.permute(0, 3, 1, 2, 4).flatten(0, 1)  # (B·V, A, P, 2)
    out = torch.zeros(batch, anchors, groups, channels // groups, dtype=dtype, device=points.device)
    for level, maps in enumerate(feature_maps):
        samples = _sample(maps.flatten(0, 1).to(dtype), grid)  # (B·V, C, A, P)
        samples = samples.unflatten(1, (groups, -1)).unflatten(0, (batch, cameras))  # (B, V, groups, C/groups, A, P)
        samples = torch.where(counts.permute(0, 3, 1, 2)[:, :, None, None], samples, 0)
        weight = torch.where(counts[..., None], weights[..., level, :].to(dtype), 0)  # (B, A, P, V, groups)
        # No matrix product, whose gradients autocast would compute in half precision.
        out = out + (samples * weight.permute(0, 3, 4, 1, 2)[:, :, :, None]).sum((1, 5)).permute(0, 3, 1, 2)
    return out.flatten(2).to(feature_maps[0].dtype)


def _sample(maps, grid):
    if 0 in maps.shape or 0 in grid.shape:  # which grid_sample refuses
        shape = (grid.shape[0], maps.shape[1], *grid.shape[1:3])
        return maps.new_zeros(shape) + 0 * (maps.sum() + grid.sum())
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

"""The baselines: what a person writes in plain eager PyTorch. Grids, every plane's warped copy, gathered keys and
scores are all materialised. In float64 they are also the reference that the others are held to."""

import torch
import torch.nn.functional as F

from ..modules.completion.temporal import MotionCompensatedTemporalCompletion

_OUTSIDE = -3.0  # a normalised coordinate that grid_sample finds outside every map


def eager_warp(features, projection, depths, *, weights=None, offsets=None, source_index=None):
    """`multi_depth_warp` with `grid_sample`, one plane after another. Returns warped and coverage."""
    height, width = features.shape[2:]
    source = features if source_index is None else features[source_index]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    source = source.to(dtype)  # grid_sample wants maps and grid in one dtype, and half-precision grids miss their cells
    projection, depths = projection.to(dtype), depths.to(dtype)
    ones = source.new_ones(len(source), 1, height, width)
    v, u = _cell_centres(height, width, source.device, dtype)
    planes, covered = [], []
    for d, depth in enumerate(depths):
        points = torch.stack([u * depth, v * depth, depth.expand_as(u), torch.ones_like(u)], dim=-1)
        p = torch.einsum("nij,hwj->nhwi", projection, points)
        location = p[..., :2] / p[..., 2:]
        if offsets is not None:
            location = location + offsets[:, min(d, offsets.shape[1] - 1)]
        grid = sampling_grid(location, p[..., 2] > 0.1)
        planes.append(F.grid_sample(source, grid, align_corners=False))
        covered.append(F.grid_sample(ones, grid.detach(), align_corners=False))
    return _blend(planes, weights).to(features.dtype), _blend(covered, weights)[:, 0].detach().float()


def _blend(planes, weights):
    """D planes (N, C, H, W) summed by their weights (N, D, H, W), or their mean."""
    stacked = torch.stack(planes, dim=1)
    return stacked.mean(dim=1) if weights is None else (stacked * weights[:, :, None]).sum(dim=1)


def eager_bev_warp(features, transform):
    """`bev_warp` with an affine grid and `grid_sample`."""
    height, width = features.shape[2:]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    v, u = _cell_centres(height, width, features.device, dtype)
    cells = torch.stack([u, v, torch.ones_like(u)], dim=-1)
    location = torch.einsum("nij,hwj->nhwi", transform.to(dtype), cells)
    grid = sampling_grid(location, torch.ones_like(location[..., 0], dtype=torch.bool))
    warped = F.grid_sample(features.to(dtype), grid, align_corners=False).to(features.dtype)
    ones = grid.new_ones(len(features), 1, height, width)
    return warped, F.grid_sample(ones, grid, align_corners=False)[:, 0].float()


def _cell_centres(height, width, device, dtype):
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    return torch.meshgrid(rows, columns, indexing="ij")


def sampling_grid(location, valid):
    """Locations (N, H, W, 2) in cells as `grid_sample` wants them; what is not valid or not finite lies outside."""
    height, width = location.shape[1:3]
    normalised = (2 * location + 1) / location.new_tensor([width, height]) - 1
    usable = valid & location.isfinite().all(dim=-1)
    return torch.where(usable[..., None], normalised, _OUTSIDE)


def gather_blocks(tensor, block_table):
    """The listed blocks of (S, Lk, …), one copy for each query block: (Nq, M·Lk, …)."""
    return tensor[block_table.clamp(min=0)].flatten(1, 2)


def gather_mask(block_table, key_mask):
    """(Nq, M·Lk) bool: which of the gathered keys count."""
    return (key_mask[block_table.clamp(min=0)] & (block_table >= 0)[..., None]).flatten(1)


def eager_attention(query, key, value, block_table, key_mask):
    """`cross_camera_attention` with gathered keys and values and stored scores."""
    key, value = gather_blocks(key, block_table), gather_blocks(value, block_table)
    mask = gather_mask(block_table, key_mask)[:, None, None]
    scores = torch.einsum("nihd,njhd->nhij", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask, 0)  # a query without any key attends to nothing
    return torch.einsum("nhij,njhd->nihd", weights, value)


def eager_fusion(original, completed, gate_logits):
    """`gated_fusion` as the formula stands."""
    gate = torch.sigmoid(gate_logits)
    return original * (1 - gate) + completed * gate


class EagerTemporalCompletion(MotionCompensatedTemporalCompletion):
    """Stage 1 without this toolkit's operations."""

    def _warp(self, features, projection, offsets, weights):
        with torch.autocast(features.device.type, enabled=False):  # or the geometry would be computed in half precision
            return eager_warp(features, projection, self.depths, weights=weights, offsets=offsets)

    def _attend(self, query, key, value, block_table, key_mask):
        return eager_attention(query, key, value, block_table, key_mask)

    def _fuse(self, original, completed, gate_logits):
        return eager_fusion(original, completed, gate_logits)

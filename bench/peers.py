"""What one writes today without this toolkit: grid_sample for warps, scaled_dot_product_attention on gathered keys."""

import torch
import torch.nn.functional as F

_OUTSIDE = -3.0  # a normalised coordinate that grid_sample finds outside every map


def grid_sample_warp(features, projection, depths, *, weights=None, offsets=None, source_index=None):
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


def grid_sample_bev_warp(features, transform):
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


def sampling_grid(location, valid):
    """Locations (N, H, W, 2) in cells as `grid_sample` wants them; what is not valid or not finite lies outside.

    Sizes enter as numbers: a tensor of them would be copied to the device, which waits for it and no CUDA graph holds.
    """
    sizes = reversed(location.shape[1:3])
    normalised = [(2 * along + 1) / size - 1 for along, size in zip(location.unbind(-1), sizes)]
    usable = valid & location.isfinite().all(dim=-1)
    return torch.where(usable[..., None], torch.stack(normalised, dim=-1), _OUTSIDE)


def gather_blocks(tensor, block_table):
    """The listed blocks of (S, Lk, …), one copy for each query block: (Nq, M·Lk, …)."""
    return tensor[block_table.clamp(min=0)].flatten(1, 2)


def gather_mask(block_table, key_mask):
    """(Nq, M·Lk) bool: which of the gathered keys count."""
    return (key_mask[block_table.clamp(min=0)] & (block_table >= 0)[..., None]).flatten(1)


def gathered_sdpa(query, key, value, block_table, key_mask):
    """Keys and values gathered for each query block, then PyTorch's fused attention with a boolean mask."""
    key, value = gather_blocks(key, block_table), gather_blocks(value, block_table)
    mask = gather_mask(block_table, key_mask)[:, None, None]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def _blend(planes, weights):
    """D planes (N, C, H, W) summed by their weights (N, D, H, W), or their mean."""
    stacked = torch.stack(planes, dim=1)
    return stacked.mean(dim=1) if weights is None else (stacked * weights[:, :, None]).sum(dim=1)


def _cell_centres(height, width, device, dtype):
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    return torch.meshgrid(rows, columns, indexing="ij")

"""What one writes today without this toolkit: grid_sample for warps, scaled_dot_product_attention on gathered keys."""

import torch
import torch.nn.functional as F

_OUTSIDE = -3.0  # a normalised coordinate that grid_sample finds outside every map


def grid_sample_warp(features, projection, depths, *, weights=None, offsets=None, source_index=None):
    """`multi_depth_warp` with `grid_sample`, one plane after another. Returns warped and coverage."""
    height, width = features.shape[2:]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    source = features.to(dtype)  # as grid_sample wants its grid, which in half precision would miss its cells
    if source_index is not None and source_index.ndim == 1:
        source = source[source_index]
    weights = None if weights is None else weights.to(dtype)
    ones = source.new_ones(len(projection), 1, height, width)
    planes, covered = [], []
    for d in range(len(depths)):
        location, valid = source_locations(projection.to(dtype), depths.to(dtype), d, height, width)
        if offsets is not None:
            location = location + offsets[:, min(d, offsets.shape[1] - 1)]
        read = source
        if source_index is not None and source_index.ndim == 2:
            read = source[source_index[:, d].clamp(min=0)]
            valid = valid & (source_index[:, d] >= 0)[:, None, None]
        grid = sampling_grid(location, valid)
        planes.append(F.grid_sample(read, grid, align_corners=False))
        covered.append(F.grid_sample(ones, grid.detach(), align_corners=False))
    return _blend(planes, weights).to(features.dtype), _blend(covered, weights)[:, 0].detach().float()


def source_locations(projection, depths, d, height, width):
    """Where hypothesis d of every target cell lies: (N, H, W, 2) in cells, and whether before the camera, (N, H, W)."""
    v, u = _cell_centres(height, width, projection.device, projection.dtype)
    depth = depths[d]
    points = torch.stack([u * depth, v * depth, depth.expand_as(u), torch.ones_like(u)], dim=-1)
    p = torch.einsum("nij,hwj->nhwi", projection[:, d] if projection.ndim == 4 else projection, points)
    return p[..., :2] / p[..., 2:], p[..., 2] > 0.1


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

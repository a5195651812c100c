"""The mathematics, as it is written down: the grid and the warped copy of every plane are stored, then blended."""

import torch
import torch.nn.functional as F

FAR = 3.0  # a normalised coordinate that grid_sample finds outside every map


def forward(features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth):
    targets, dtype = len(projection), torch.promote_types(features.dtype, projection.dtype)
    if 0 in (len(features), *features.shape[2:], targets, height, width):  # which grid_sample refuses
        nothing = sum(t[:0].sum() for t in (features, weights, offsets) if t is not None)
        warped = torch.zeros(targets, features.shape[1], height, width, device=features.device) + nothing
        return warped.to(features.dtype), torch.zeros(targets, height, width, device=features.device)

    projection = projection.to(dtype)
    planes, covered = [], []
    for d in range(1 if depths is None else depths.shape[-1]):
        source, exists = _source(features.to(dtype), _of(source_index, d, 1), targets)
        location, in_front = _locate(_of(projection, d, 3), depths, offsets, d, height, width, min_depth)
        if nearest:
            location = torch.floor(location + 0.5)
        usable = exists[:, None, None] & in_front & location.isfinite().all(dim=-1)
        x, y = location.unbind(-1)
        grid = torch.stack([(2 * x + 1) / features.shape[3] - 1, (2 * y + 1) / features.shape[2] - 1], dim=-1)
        grid = torch.where(usable[..., None], grid.clamp(-FAR, FAR), FAR).to(dtype)
        mode, ones = "nearest" if nearest else "bilinear", source.new_ones(targets, 1, *source.shape[2:])
        planes.append(F.grid_sample(source, grid, mode, align_corners=False))
        covered.append(F.grid_sample(ones, grid.detach(), mode, align_corners=False))

    planes, covered = torch.stack(planes, dim=1), torch.stack(covered, dim=1)  # (N, D, C or 1, H, W)
    if weights is None:
        return planes.mean(dim=1).to(features.dtype), covered.mean(dim=(1, 2)).float()
    weights = weights[:, :, None].masked_fill(covered == 0, 0)  # what lies outside counts nothing, whatever its weight
    coverage = (weights.detach() * covered).sum(dim=(1, 2))
    return (weights * planes).sum(dim=1).to(features.dtype), coverage.float()


def _of(tensor, d, dims):
    """What hypothesis d has of a tensor with `dims` dimensions, one for all, or with one more, (N, D, …)."""
    return tensor if tensor is None or tensor.ndim == dims else tensor[:, d]


def _source(features, index, targets):
    """The maps (N, C, Hs, Ws) that the targets read, and which targets have one."""
    if index is None:
        return features, torch.ones(targets, dtype=torch.bool, device=features.device)
    exists = (index >= 0) & (index < len(features))
    return features[torch.where(exists, index, 0)], exists


def _locate(projection, depths, offsets, d, height, width, min_depth):
    """Source locations (N, H, W, 2) in cells at the depth of number d, and where they are beyond `min_depth`."""
    v, u = torch.meshgrid(
        *(torch.arange(n, dtype=projection.dtype, device=projection.device) for n in (height, width)), indexing="ij"
    )
    cells = torch.stack([u, v, torch.ones_like(u)], dim=-1)  # (H, W, 3)
    if depths is None:
        location = torch.einsum("nij,hwj->nhwi", projection, cells)
        return location, torch.ones_like(location[..., 0], dtype=torch.bool)
    depth = depths.expand(len(projection), -1)[:, d, None, None, None].to(projection.dtype)
    points = torch.cat([cells * depth, torch.ones_like(cells[..., :1]).expand(len(projection), -1, -1, -1)], dim=-1)
    p = torch.einsum("nij,nhwj->nhwi", projection, points)
    location = p[..., :2] / p[..., 2:]
    if offsets is not None:
        location = location + offsets[:, min(d, offsets.shape[1] - 1)]
    return location, p[..., 2] > min_depth

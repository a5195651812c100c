"""Sparse depth targets for the levels of a feature pyramid, from LiDAR points."""

from collections.abc import Sequence

import torch


def depth_targets(
    points: torch.Tensor,
    image_T_ego: torch.Tensor,
    size: tuple[int, int],
    strides: Sequence[int] = (4, 8, 16),
    nearest: float = 0.1,
    farthest: float = 60.0,
) -> list[torch.Tensor]:
    """Returns for each stride (V, ⌈height / stride⌉, ⌈width / stride⌉) float32 depths: of the nearest point in each
    cell, 0 where there is none.

    Depth is along the optical axis, metres. Pixel centres lie at integers, so a cell covers the pixel coordinates
    [u·stride − 0.5, (u + 1)·stride − 0.5).

    Args:
        points: (P, 3 or more), x, y, z in the ego frame first; not finite ones are left out.
        image_T_ego: (V, 4, 4), see `Camera.image_T_ego`; of augmented images too.
        size: (height, width) of the images, pixels.
        strides: pixels per cell of each level.
        nearest, farthest: depths that count, metres.
    """
    (height, width), cameras = size, len(image_T_ego)
    points = points[:, :3].double()
    points = points[points.isfinite().all(dim=1)]
    projected = points @ image_T_ego[:, :3, :3].double().mT + image_T_ego[:, None, :3, 3].double()  # (V, P, 3)
    depth = projected[..., 2]
    u, v = (projected[..., axis] / depth.clamp(min=1e-9) + 0.5 for axis in range(2))  # from the image's corner
    seen = (depth >= nearest) & (depth <= farthest) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    camera, _ = seen.nonzero(as_tuple=True)
    u, v, depth = u[seen], v[seen], depth[seen].float()
    levels = []
    for stride in strides:
        rows, columns = -(-height // stride), -(-width // stride)
        cell = (camera * rows + (v / stride).long()) * columns + (u / stride).long()
        level = depth.new_zeros(cameras * rows * columns)
        level.scatter_reduce_(0, cell, depth, "amin", include_self=False)
        levels.append(level.view(cameras, rows, columns))
    return levels

"""Sparse targets for the levels of a feature pyramid, from LiDAR points: depth, and whose points they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SeenPoints:
    """Points in the cells of a rig's images, one entry for each image that sees a point; made by `seen_points`."""

    index: torch.Tensor  # (S,) int64, which point
    depth: torch.Tensor  # (S,) float32 metres, along the optical axis
    cells: list[torch.Tensor]  # for each stride (S,) int64, the place in all (V, rows, columns)
    shapes: list[torch.Size]  # for each stride (V, rows, columns)

    def depths(self) -> list[torch.Tensor]:
        """For each stride (V, rows, columns) float32 metres: the nearest point in each cell, 0 where there is none."""
        levels = []
        for cell, shape in zip(self.cells, self.shapes):
            level = self.depth.new_zeros(shape.numel())
            level.scatter_reduce_(0, cell, self.depth, "amin", include_self=False)
            levels.append(level.view(shape))
        return levels

    def labels(self, labels: torch.Tensor) -> list[torch.Tensor]:
        """For each stride (V, rows, columns) int64: the label of the nearest point in each cell that has one, −1 where
        all its points have none, −2 where there is no point.

        Objects come before what they stand on, since a small one has few of a cell's points. `labels` (P,) int64 are
        the points', −1 = none.
        """
        label = labels[self.index]
        order = self.depth.argsort(descending=True)
        order = torch.cat([order[label[order] < 0], order[label[order] >= 0]])  # whoever is later overwrites
        levels = []
        for cell, shape in zip(self.cells, self.shapes):
            place = torch.full((shape.numel(),), -1)
            place.scatter_reduce_(0, cell[order], torch.arange(len(order)), "amax")
            level = label[order][place] if len(order) else place
            levels.append(torch.where(place < 0, -2, level).view(shape))
        return levels


def seen_points(
    points: torch.Tensor,
    image_T_ego: torch.Tensor,
    size: tuple[int, int],
    strides: Sequence[int] = (4, 8, 16),
    nearest: float = 0.1,
    farthest: float = 60.0,
) -> SeenPoints:
    """Returns which cells of the images see which points.

    Pixel centres lie at integers, so a cell covers the pixel coordinates [u·stride − 0.5, (u + 1)·stride − 0.5); there
    are ⌈height / stride⌉ rows and ⌈width / stride⌉ columns of them.

    Args:
        points: (P, 3 or more), x, y, z in the ego frame first; not finite ones are left out.
        image_T_ego: (V, 4, 4), see `Camera.image_T_ego`; of augmented images too.
        size: (height, width) of the images, pixels.
        strides: pixels per cell of each level.
        nearest, farthest: depths that count, metres.
    """
    (height, width), cameras = size, len(image_T_ego)
    points = points[:, :3].double()
    finite = points.isfinite().all(dim=1).nonzero()[:, 0]
    points = points[finite]
    projected = points @ image_T_ego[:, :3, :3].double().mT + image_T_ego[:, None, :3, 3].double()  # (V, P, 3)
    depth = projected[..., 2]
    u, v = (projected[..., axis] / depth.clamp(min=1e-9) + 0.5 for axis in range(2))  # from the image's corner
    seen = (depth >= nearest) & (depth <= farthest) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    camera, index = seen.nonzero(as_tuple=True)
    u, v, depth = u[seen], v[seen], depth[seen].float()
    cells, shapes = [], []
    for stride in strides:
        rows, columns = -(-height // stride), -(-width // stride)
        cells.append((camera * rows + (v / stride).long()) * columns + (u / stride).long())
        shapes.append(torch.Size((cameras, rows, columns)))
    return SeenPoints(finite[index], depth, cells, shapes)

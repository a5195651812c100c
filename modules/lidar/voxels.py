"""From LiDAR points to voxels and their features (VoxelNet, Zhou & Tuzel 2018; Zhou et al. 2019).

Deterministic: sorts, segments and gathers, no atomic additions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.runtime.checks import Shapes, check_dtype, check_same_device
from .sparse import RowBatchNorm, SparseTensor


class Voxels(NamedTuple):
    """The points of a batch, voxel after voxel.

    points: (P', F), those inside the range, sorted by voxel, in their given order within one.
    coordinates: (N, 4) int64: sample, z, y, x of each voxel that has a point, ascending.
    lengths: (N,) int64, how many points each has; they add up to P'.
    """

    points: torch.Tensor
    coordinates: torch.Tensor
    lengths: torch.Tensor


def grid_shape(point_range: tuple[float, ...], voxel_size: tuple[float, ...]) -> tuple[int, int, int]:
    """(Z, Y, X): voxels of `voxel_size` (x, y, z) in `point_range`; ValueError where they do not fill it exactly."""
    if len(point_range) != 6 or len(voxel_size) != 3 or not min(voxel_size) > 0:
        got = f"point_range is {point_range} and voxel_size {voxel_size}"
        raise ValueError(f"grid_shape: {got}, needs six limits and three sizes above 0")
    sizes = [(high - low) / size for low, high, size in zip(point_range[:3], point_range[3:], voxel_size)]
    if not all(size > 0.5 and abs(size - round(size)) < 1e-3 for size in sizes):
        raise ValueError(f"grid_shape: point_range {point_range} holds {sizes} voxels, needs whole numbers above 0")
    return tuple(round(size) for size in reversed(sizes))


def voxelize(
    points: torch.Tensor,
    sample: torch.Tensor,
    batch_size: int,
    point_range: tuple[float, ...],
    voxel_size: tuple[float, ...],
    grid: tuple[int, int, int] | None = None,
) -> Voxels:
    """Sorts points into voxels; points outside the range or with a value that is not finite are dropped.

    Args:
        points: (P, F ≥ 3) float32 or float64: x, y, z in metres (ego frame), then any other features.
        sample: (P,) int64, which sample of the batch each point belongs to.
        batch_size: number of samples.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres; a minimum is inside, a maximum outside.
        voxel_size: (x, y, z), metres; divides the range into whole voxels.
        grid: (Z, Y, X) of the voxels to keep, from the range's lower corner; None = all that the range holds.

    Raises:
        ValueError: a shape or a device does not fit, `sample` is outside the batch, or the range is not whole voxels.
        TypeError: a dtype does not fit.
    """
    held = grid_shape(point_range, voxel_size)
    shape = held if grid is None else tuple(grid)
    limits = [min(pair) for pair in zip(held, shape)]
    shapes = Shapes("voxelize")
    if shapes.bind("points", points, "P", "F")[1] < 3:
        raise ValueError(f"voxelize: points has shape {tuple(points.shape)}, needs (P, F) with F ≥ 3")
    shapes.bind("sample", sample, "P")
    check_dtype("voxelize", "points", points, (torch.float32, torch.float64))
    check_dtype("voxelize", "sample", sample, (torch.int64,))
    check_same_device("voxelize", "points", points, sample=sample)
    if not ((sample >= 0) & (sample < batch_size)).all():
        low, high = (int(value) for value in sample.aminmax())
        raise ValueError(f"voxelize: sample has values from {low} to {high}, needs 0 to {batch_size - 1}")
    # Compared before they are integers: what is not finite compares False, what is huge would wrap round.
    cells = ((points[:, :3] - points.new_tensor(point_range[:3])) / points.new_tensor(voxel_size)).floor()
    inside = ((cells >= 0) & (cells < points.new_tensor(limits[::-1]))).all(1) & points.isfinite().all(1)
    points, (x, y, z) = points[inside], cells[inside].long().unbind(1)
    keys = ((sample[inside] * shape[0] + z) * shape[1] + y) * shape[2] + x
    keys, order = keys.sort(stable=True)
    keys, lengths = torch.unique_consecutive(keys, return_counts=True)
    return Voxels(points[order], torch.stack(torch.unravel_index(keys, (batch_size, *shape)), 1), lengths)


class VoxelEncoder(nn.Module):
    """Features of voxels from their points (dynamic voxel feature encoding, Zhou et al. 2019, one layer).

    A point's own features, its offset from the mean of its voxel's points and its offset from the voxel's centre pass a
    linear layer, batch norm and ReLU; the voxel takes the maximum over its points.

    Args:
        point_range, voxel_size, grid: as in `voxelize`.
        point_features: F of a point: x, y, z, intensity, seconds before the key frame.
        channels: C of a voxel.
    """

    def __init__(
        self,
        point_range: tuple[float, ...],
        voxel_size: tuple[float, ...],
        *,
        point_features: int = 5,
        channels: int = 16,
        grid: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        self.spatial_shape = grid or grid_shape(point_range, voxel_size)
        self.channels = channels
        self.point_features, self.point_range, self.voxel_size = point_features, tuple(point_range), tuple(voxel_size)
        self.linear = nn.Linear(point_features + 6, channels, bias=False)
        self.norm = RowBatchNorm(channels)

    def forward(self, points: torch.Tensor, sample: torch.Tensor, batch_size: int) -> SparseTensor:
        """points (P, point_features) float32, sample (P,) int64 → (N, channels) on the voxels that have a point.

        P may be 0. Points get no gradient. Errors as in `voxelize`.
        """
        Shapes("VoxelEncoder", point_features=self.point_features).bind("points", points, "P", "point_features")
        voxels = voxelize(points.detach(), sample, batch_size, self.point_range, self.voxel_size, self.spatial_shape)
        rows = F.relu(self.norm(self.linear(self._describe(voxels))))
        features = torch.segment_reduce(rows, "max", lengths=voxels.lengths, unsafe=True)  # of lengths that are right
        return SparseTensor(features, voxels.coordinates, self.spatial_shape, batch_size)

    def _describe(self, voxels):
        """What the linear layer sees of each point, (P', point_features + 6)."""
        points, coordinates, lengths = voxels
        place = points[:, :3]
        size, low = place.new_tensor(self.voxel_size), place.new_tensor(self.point_range[:3])
        mean = torch.segment_reduce(place, "mean", lengths=lengths, unsafe=True)
        center = (coordinates[:, [3, 2, 1]] + 0.5) * size + low
        mean, center = torch.cat([mean, center], 1).repeat_interleave(lengths, 0, output_size=len(points)).split(3, 1)
        return torch.cat([points, place - mean, place - center], 1)


class MeanVoxelEncoder(nn.Module):
    """The mean of the first points of each voxel (mmdetection3d's HardSimpleVFE). It has no parameters.

    Args:
        point_range, voxel_size, grid: as in `voxelize`.
        point_features: F of a point, and C of a voxel.
        max_points: how many points of a voxel count, in their given order.
    """

    def __init__(
        self,
        point_range: tuple[float, ...],
        voxel_size: tuple[float, ...],
        *,
        point_features: int = 5,
        max_points: int = 10,
        grid: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        self.spatial_shape = grid or grid_shape(point_range, voxel_size)
        self.channels, self.max_points = point_features, max_points
        self.point_range, self.voxel_size = tuple(point_range), tuple(voxel_size)

    def forward(self, points: torch.Tensor, sample: torch.Tensor, batch_size: int) -> SparseTensor:
        """points (P, point_features) float32, sample (P,) int64 → (N, point_features) on the voxels that have a point.

        P may be 0. Nothing gets gradients. Errors as in `voxelize`.
        """
        Shapes("MeanVoxelEncoder", point_features=self.channels).bind("points", points, "P", "point_features")
        points, coordinates, lengths = voxelize(
            points.detach(), sample, batch_size, self.point_range, self.voxel_size, self.spatial_shape
        )
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=len(points))
        kept = torch.arange(len(points), device=points.device) - first < self.max_points
        lengths = lengths.clamp(max=self.max_points)
        features = torch.segment_reduce(points[kept], "mean", lengths=lengths, unsafe=True)
        return SparseTensor(features, coordinates, self.spatial_shape, batch_size)

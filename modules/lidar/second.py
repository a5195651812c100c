"""The LiDAR branch: points to voxels to a bird's-eye-view map (VoxelNet, Zhou & Tuzel 2018; SECOND, Yan et al. 2018).

Defaults are the `voxel0100` configuration of CMT (Yan et al. 2023): 1024 × 1024 × 40 voxels of 0.1 × 0.1 × 0.2 m.
Deterministic: sorts, segments and gathers, no atomic additions. The 2-D convolutions are PyTorch's own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.runtime.checks import Shapes, check_dtype, check_same_device
from .sparse import RowBatchNorm, SparseBasicBlock, SparseConv3d, SparseConvBlock, SparseTensor, SubmanifoldConv3d

POINT_RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)  # x, y, z from; x, y, z to; metres, ego frame
VOXEL_SIZE = (0.1, 0.1, 0.2)  # x, y, z, metres


class Voxels(NamedTuple):
    """Points of a batch, voxel after voxel.

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
    point_range: tuple[float, ...] = POINT_RANGE,
    voxel_size: tuple[float, ...] = VOXEL_SIZE,
) -> Voxels:
    """Sorts points into voxels; points outside the range or with a value that is not finite are dropped.

    Args:
        points: (P, F ≥ 3) float32 or float64: x, y, z in metres (ego frame), then any other features.
        sample: (P,) int64, which sample of the batch each point belongs to.
        batch_size: number of samples.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres; a minimum is inside, a maximum outside.
        voxel_size: (x, y, z), metres; divides the range into whole voxels.

    Raises:
        ValueError: a shape or a device does not fit, `sample` is outside the batch, or the range is not whole voxels.
        TypeError: a dtype does not fit.
    """
    shape = grid_shape(point_range, voxel_size)
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
    inside = ((cells >= 0) & (cells < points.new_tensor(shape[::-1]))).all(1) & points.isfinite().all(1)
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
        point_features: F of a point: x, y, z, intensity, seconds before the key frame.
        channels: C of a voxel.
        point_range, voxel_size: as in `voxelize`.
    """

    def __init__(
        self,
        point_features: int = 5,
        channels: int = 16,
        *,
        point_range: tuple[float, ...] = POINT_RANGE,
        voxel_size: tuple[float, ...] = VOXEL_SIZE,
    ):
        super().__init__()
        self.spatial_shape = grid_shape(point_range, voxel_size)
        self.point_features, self.point_range, self.voxel_size = point_features, tuple(point_range), tuple(voxel_size)
        self.linear = nn.Linear(point_features + 6, channels, bias=False)
        self.norm = RowBatchNorm(channels)

    def forward(self, points: torch.Tensor, sample: torch.Tensor, batch_size: int) -> SparseTensor:
        """points (P, point_features) float32, sample (P,) int64 → (N, channels) on the voxels that have a point.

        P may be 0. Points get no gradient. Errors as in `voxelize`.
        """
        Shapes("VoxelEncoder", point_features=self.point_features).bind("points", points, "P", "point_features")
        voxels = voxelize(points.detach(), sample, batch_size, self.point_range, self.voxel_size)
        rows = F.relu(self.norm(self.linear(self._describe(voxels))))
        features = torch.segment_reduce(rows, "max", lengths=voxels.lengths, unsafe=True)  # of lengths that are right
        return SparseTensor(features, voxels.coordinates, self.spatial_shape, batch_size)

    def _describe(self, voxels):
        """(P', point_features + 6)"""
        points, coordinates, lengths = voxels
        place = points[:, :3]
        size, low = place.new_tensor(self.voxel_size), place.new_tensor(self.point_range[:3])
        mean = torch.segment_reduce(place, "mean", lengths=lengths, unsafe=True)
        center = (coordinates[:, [3, 2, 1]] + 0.5) * size + low
        mean, center = torch.cat([mean, center], 1).repeat_interleave(lengths, 0, output_size=len(points)).split(3, 1)
        return torch.cat([points, place - mean, place - center], 1)


class SparseMiddleEncoder(nn.Module):
    """Voxels to a bird's-eye-view map: sparse convolutions that halve (z, y, x), then z into channels (SECOND).

    A submanifold stem, then stages of basic blocks with a stride-2 convolution between them; a last convolution along z
    (kernel 3 or what is left, stride 2) and the rest of z becomes channels, as CMT's middle encoder.

    Args:
        in_channels: C of the voxels.
        spatial_shape: (Z, Y, X) of the voxels.
        channels: of the stages.
        blocks: basic blocks in each stage.

    `out_channels` says how many channels the map has: channels[-1] times what is left of z, 256 by default.
    """

    def __init__(
        self,
        in_channels: int = 16,
        spatial_shape: tuple[int, int, int] = (40, 1024, 1024),
        *,
        channels: tuple[int, ...] = (16, 32, 64, 128),
        blocks: int = 2,
    ):
        super().__init__()
        self.spatial_shape = tuple(spatial_shape)
        self.stem = SparseConvBlock(SubmanifoldConv3d(in_channels, channels[0]))
        self.stages, shape = nn.ModuleList(), self.spatial_shape
        for index, width in enumerate(channels):
            stage = nn.Sequential(*(SparseBasicBlock(width) for _ in range(blocks)))
            if index:
                conv = SparseConv3d(channels[index - 1], width)
                stage.insert(0, SparseConvBlock(conv))
                shape = conv.output_shape(shape)
            self.stages.append(stage)
        conv = SparseConv3d(channels[-1], channels[-1], (min(3, shape[0]), 1, 1), (2, 1, 1), (0, 0, 0))
        self.collapse = SparseConvBlock(conv)
        self.out_channels = channels[-1] * conv.output_shape(shape)[0]

    def forward(self, voxels: SparseTensor) -> torch.Tensor:
        """(N, in_channels) on `spatial_shape` → (B, out_channels, ⌈Y/8⌉, ⌈X/8⌉) with four stages, row = y, column = x.

        Zero where no voxel reaches. Channel c of height z is channel c · Z' + z. Gradients: features, parameters.
        """
        if voxels.spatial_shape != self.spatial_shape:
            needed = f"needs {self.spatial_shape}"
            raise ValueError(f"SparseMiddleEncoder: voxels has spatial_shape {voxels.spatial_shape}, {needed}")
        x = self.stem(voxels)
        for stage in self.stages:
            x = stage(x)
        return self.collapse(x).dense().flatten(1, 2)


class SECOND(nn.Module):
    """2-D convolutions over the bird's-eye-view map, one stage for each scale (SECOND, Yan et al. 2018).

    Args:
        in_channels: C of the map.
        out_channels, layers, strides: of each stage: its C, its convolutions after the first, the stride of the first.
        frozen_stages: how many stages get no gradient and keep their statistics, as in `ResNetFPN`, whose stage 0 is a
            stem, which is not here; more than there are = all, −1 = none.
        norm_eval: every batch norm keeps its statistics in training too.
    """

    def __init__(
        self,
        in_channels: int = 256,
        out_channels: tuple[int, ...] = (128, 256),
        layers: tuple[int, ...] = (5, 5),
        strides: tuple[int, ...] = (1, 2),
        *,
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ):
        super().__init__()
        if not len(out_channels) == len(layers) == len(strides):
            got = f"out_channels is {out_channels}, layers {layers}, strides {strides}"
            raise ValueError(f"SECOND: {got}, needs one of each for each stage")
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.stages = nn.ModuleList()
        for before, after, count, stride in zip((in_channels, *out_channels), out_channels, layers, strides):
            rest = (_conv_block(nn.Conv2d(after, after, 3, padding=1, bias=False)) for _ in range(count))
            first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            self.stages.append(nn.Sequential(_conv_block(first), *rest))
        self._frozen().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, in_channels, H, W) → one (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉) for each stage, strides multiplied."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def train(self, mode: bool = True):
        super().train(mode)
        self._frozen().eval()
        if self.norm_eval:
            _norms_eval(self)
        return self

    def _frozen(self) -> nn.ModuleList:
        return self.stages[: max(self.frozen_stages, 0)]


class SECONDNeck(nn.Module):
    """Brings the maps of `SECOND` to one size and one stack (the FPN of SECOND).

    Args:
        in_channels, out_channels: C of each map before and after.
        upsample: factor of each map, by a transposed convolution; 1 = a 1×1 convolution.
        norm_eval: every batch norm keeps its statistics in training too.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...] = (128, 256),
        out_channels: tuple[int, ...] = (256, 256),
        upsample: tuple[int, ...] = (1, 2),
        *,
        norm_eval: bool = False,
    ):
        super().__init__()
        if not len(in_channels) == len(out_channels) == len(upsample):
            got = f"in_channels is {in_channels}, out_channels {out_channels}, upsample {upsample}"
            raise ValueError(f"SECONDNeck: {got}, needs one of each for each map")
        self.norm_eval = norm_eval
        self.blocks = nn.ModuleList(
            # with factor 1 this is the 1×1 convolution
            _conv_block(nn.ConvTranspose2d(before, after, factor, stride=factor, bias=False))
            for before, after, factor in zip(in_channels, out_channels, upsample)
        )

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """One (B, C, H/factor, W/factor) for each of in_channels → (B, Σ out_channels, H, W)."""
        if len(maps) != len(self.blocks):
            raise ValueError(f"SECONDNeck: maps has {len(maps)} maps, needs {len(self.blocks)}")
        return torch.cat([block(x) for block, x in zip(self.blocks, maps)], 1)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.norm_eval:
            _norms_eval(self)
        return self


def _conv_block(conv):
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=0.01), nn.ReLU())


def _norms_eval(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()

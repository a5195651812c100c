"""The LiDAR branch from voxels to a bird's-eye-view (BEV) map (SECOND, Yan et al. 2018).

Defaults are the `voxel0100` configuration of CMT (Yan et al. 2023): 1024 × 1024 × 40 voxels of 0.1 × 0.1 × 0.2 m.
The sparse part is deterministic; the 2-D convolutions are PyTorch's own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import nn

from ..settings import Count, Positive, Range, Whole
from .sparse import SparseBasicBlock, SparseConv3d, SparseConvBlock, SparseTensor, SubmanifoldConv3d
from .voxels import MeanVoxelEncoder, VoxelEncoder, grid_shape


@dataclass
class LidarConfig:
    """Settings of the LiDAR branch."""

    voxel_size: tuple[Positive, Positive, Positive] = (0.1, 0.1, 0.2)  # x, y, z, metres
    grid: tuple[Count, Count, Count] | None = None  # (Z, Y, X) voxels from the range's lower corner; None = its own
    vfe: Literal["dynamic", "mean"] = "dynamic"  # how points make a voxel: learned from all, or the mean of ten
    channels: tuple[Count, ...] = (16, 32, 64, 128)  # of the middle encoder's stages, each half the size of the last
    blocks: Count = 2  # in each of them
    last_z_padding: Annotated[int, Range(at_least=0, at_most=1)] = 1  # of the last halving before the map, along z
    second: tuple[Count, Count] = (128, 256)  # channels of SECOND's stages
    layers: Whole = 5  # convolutions in each of them after the first
    frozen_stages: Annotated[int, Range(at_least=-1)] = 3  # of SECOND; more than there are = all, −1 = none
    norm_eval: bool = True  # batch norms of SECOND and of its neck keep their statistics in training too

    def build(self, point_range: tuple[float, ...], channels: int) -> "LidarBranch":
        """Builds the branch for points in this range (metres); its map has 2 · `channels` channels."""
        encoder = VoxelEncoder if self.vfe == "dynamic" else MeanVoxelEncoder
        voxel_encoder = encoder(point_range, self.voxel_size, grid=self.grid)
        voxels = voxel_encoder.channels, voxel_encoder.spatial_shape
        middle_encoder = SparseMiddleEncoder(*voxels, self.channels, self.blocks, self.last_z_padding)
        norms = dict(norm_eval=self.norm_eval)
        layers = (self.layers,) * len(self.second)
        backbone = SECOND(middle_encoder.out_channels, self.second, layers, frozen_stages=self.frozen_stages, **norms)
        return LidarBranch(
            voxel_encoder, middle_encoder, backbone, SECONDNeck(self.second, (channels, channels), **norms)
        )

    def bev_shape(self, point_range: tuple[float, ...]) -> tuple[int, int]:
        """(H, W) of the map for points in this range."""
        halved = 2 ** (len(self.channels) - 1)  # between the middle encoder's stages
        _, height, width = self.grid or grid_shape(point_range, self.voxel_size)
        return -(-height // halved), -(-width // halved)

    def bev_extent(self, point_range: tuple[float, ...]) -> tuple[float, float]:
        """Metres along x and y that the map spans, from the range's lower corner."""
        _, height, width = self.grid or grid_shape(point_range, self.voxel_size)
        return width * self.voxel_size[0], height * self.voxel_size[1]


class LidarBranch(NamedTuple):
    """The parts from points to a map, in the order in which they follow one another."""

    voxel_encoder: VoxelEncoder | MeanVoxelEncoder
    middle_encoder: "SparseMiddleEncoder"
    backbone: "SECOND"
    neck: "SECONDNeck"


class SparseMiddleEncoder(nn.Module):
    """Turns voxels into a BEV map: sparse convolutions that halve (z, y, x), then z becomes channels (SECOND).

    A submanifold stem, then stages of basic blocks with a stride-2 convolution between them; a last convolution along z
    (kernel 3 or what is left, stride 2) and the rest of z becomes channels, as CMT's middle encoder.

    Args:
        in_channels: C of the voxels.
        spatial_shape: (Z, Y, X) of the voxels.
        channels: of the stages.
        blocks: basic blocks in each stage.
        last_z_padding: of the last stride-2 convolution between stages, along z.

    `out_channels` says how many channels the map has: channels[-1] times what is left of z.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_shape: tuple[int, int, int],
        channels: tuple[int, ...],
        blocks: int,
        last_z_padding: int = 1,
    ):
        super().__init__()
        self.spatial_shape = tuple(spatial_shape)
        self.stem = SparseConvBlock(SubmanifoldConv3d(in_channels, channels[0]))
        self.stages, shape = nn.ModuleList(), self.spatial_shape
        for index, width in enumerate(channels):
            stage = nn.Sequential(*(SparseBasicBlock(width) for _ in range(blocks)))
            if index:
                padding = (last_z_padding if index == len(channels) - 1 else 1, 1, 1)
                conv = SparseConv3d(channels[index - 1], width, padding=padding)
                stage.insert(0, SparseConvBlock(conv))
                shape = conv.output_shape(shape)
            self.stages.append(stage)
        conv = SparseConv3d(channels[-1], channels[-1], (min(3, shape[0]), 1, 1), (2, 1, 1), (0, 0, 0))
        self.collapse = SparseConvBlock(conv)
        self.out_channels = channels[-1] * conv.output_shape(shape)[0]

    def forward(self, voxels: SparseTensor) -> torch.Tensor:
        """Turns features (N, in_channels) on `spatial_shape` into a map (B, out_channels, ⌈Y/8⌉, ⌈X/8⌉), where it has
        four stages: row = y, column = x.

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
        frozen_stages: how many stages get no gradient and keep their statistics. Counted as in `ResNet`, whose stage 0
            is a stem, which is not here; more than there are = all, −1 = none.
        norm_eval: every batch norm keeps its statistics in training too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: tuple[int, ...],
        layers: tuple[int, ...],
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
        """Turns a map (B, in_channels, H, W) into one (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉) for each stage, strides
        multiplied."""
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
        in_channels: tuple[int, ...],
        out_channels: tuple[int, ...],
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
        """Turns one map (B, C, H/factor, W/factor) for each of `in_channels` into (B, Σ out_channels, H, W)."""
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

"""What the Q-Former reads: cells of image features, with camera and place in them."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..backbones import PyramidConfig, ResNetFPN
from ..positions import sinusoidal
from ..rig import NUSCENES_CAMERAS, RigFrame, cell_T_image
from ..settings import Count, Metres, Positive

_PLACE = 64  # numbers that say where a cell's ray meets the ground
_LEVEL = -1e-3  # slope of a ray from which on it meets the ground


@dataclass
class ImageConfig:
    backbone: PyramidConfig = field(
        default_factory=lambda: PyramidConfig(frozen_stages=0, norm_eval=True, strides=(16, 32))
    )
    channels: Count = 256  # of every scale
    cameras: tuple[str, ...] = NUSCENES_CAMERAS
    ground: Metres = 0.0  # height of the ground, metres, ego frame
    reach: Positive = 45.0  # metres from the ego frame's origin up to which ground is told apart


class ImageTokens(nn.Module):
    """Features of all cameras' cells, each with its camera, its scale and its place added.

    A Q-Former has no positions of its own. A cell's place is the ray through its centre in the ego frame: direction,
    origin, and where the ray meets the ground, as sines and cosines. So what a cell shows and where that is on the map
    come together, whatever the rig.

    Args:
        config: see `ImageConfig`.
        width: of the tokens.
        grid: rows and columns of the parts of an image.
    """

    def __init__(self, config: ImageConfig, width: int, grid: tuple[int, int]):
        super().__init__()
        self.config, self.grid = config, grid
        self.backbone = ResNetFPN(config.backbone, config.channels).to(memory_format=torch.channels_last)
        self.content = nn.Linear(config.channels, width)
        self.camera = nn.Embedding(len(config.cameras), width)
        self.scale = nn.Embedding(len(config.backbone.strides), width)
        self.place = nn.Sequential(nn.Linear(_PLACE + 7, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.camera, self.scale):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self, images: torch.Tensor, frame: RigFrame, missing: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Turns images into tokens, scale after scale, camera after camera, row after row.

        Args:
            images: (B, V, 3, H, W), normalised. Those of missing cameras are never looked at.
            frame: the rigs.
            missing: (B, V) bool, True = missing; None = nobody is.

        Returns:
            tokens (B, K, width); the means of the finest scale's over the parts of every image, (B, V · rows · columns,
            width), zero for missing cameras; and which tokens are of cameras that are there (B, K) bool, None = all.
        """
        batch, views = images.shape[:2]
        if missing is not None:
            images = torch.where(missing[:, :, None, None, None], 0, images)  # statistics must not see them either
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        camera = torch.arange(views, device=images.device)
        tokens, there = [], []
        for scale, (stride, level) in enumerate(zip(self.backbone.strides, self.backbone(flat))):
            content = self.content(level.flatten(2).mT).unflatten(0, (batch, views))  # (B, V, cells, width)
            place = self.place(self._places(frame, tuple(level.shape[-2:]), stride, images.device))
            found = self.norm(content + place + self.camera(camera)[:, None] + self.scale.weight[scale])
            tokens.append(found.flatten(1, 2))
            if scale == 0:
                parts = mean_of_parts(found.unflatten(2, level.shape[-2:]), self.grid)
            if missing is not None:
                there.append((~missing)[:, :, None].expand(-1, -1, content.shape[2]).flatten(1))
        if missing is not None:
            parts = torch.where(missing[:, :, None, None], 0, parts)
        return torch.cat(tokens, dim=1), parts.flatten(1, 2), torch.cat(there, dim=1) if there else None

    def _places(self, frame, size, stride, device):
        """(B, V, cells, numbers) float32: where each cell's ray meets the ground, whether it does, its direction, its
        origin."""
        origin, direction = cell_rays(frame.image_T_ego, size, stride)
        ground, meets = ground_points(origin, direction, self.config.ground, self.config.reach)
        place = sinusoidal((ground / self.config.reach + 1) / 2, _PLACE)
        origin = origin[:, :, None].expand_as(direction)
        return torch.cat([place, meets[..., None], direction, origin / 3], dim=-1).float().to(device)


def mean_of_parts(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Means over the parts of maps (…, H, W, C): (…, rows · columns, C). As adaptive average pooling, but with a
    gradient that is the same on every run."""
    rows, columns = (_averages(size, count).to(maps) for size, count in zip(maps.shape[-3:-1], grid))
    return torch.einsum("ih,jw,...hwc->...ijc", rows, columns, maps).flatten(-3, -2)


def _averages(size, count):
    """(count, size): the mean over each of `count` parts of a row, which overlap where they must."""
    part, place = torch.arange(count)[:, None], torch.arange(size)
    inside = (place >= part * size // count) & (place < -(-(part + 1) * size // count))
    return inside / inside.sum(1, keepdim=True)


def cell_rays(image_T_ego: torch.Tensor, size: tuple[int, int], stride: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rays through the centres of all cells of a map, row after row.

    Args:
        image_T_ego: (B, V, 4, 4) float64.
        size: height and width of the map.
        stride: image pixels per cell.

    Returns:
        origin (B, V, 3), metres, and direction (B, V, cells, 3) of length 1; float64, ego frame.
    """
    cell_T_ego = cell_T_image(stride).to(image_T_ego.device) @ image_T_ego[:, :, :3]
    ego_T_ray = torch.linalg.inv(cell_T_ego[..., :3])
    origin = -(ego_T_ray @ cell_T_ego[..., 3:])[..., 0]
    rows, columns = (torch.arange(side, dtype=torch.float64, device=image_T_ego.device) for side in size)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    cells = torch.stack([u, v, torch.ones_like(u)], dim=-1).flatten(0, 1)  # (cells, 3)
    direction = cells @ ego_T_ray.mT
    return origin, direction / direction.norm(dim=-1, keepdim=True)


def ground_points(
    origin: torch.Tensor, direction: torch.Tensor, ground: float, reach: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays meet the plane z = ground: x and y (B, V, cells, 2) metres, at most `reach` far from the origin of the
    ego frame, and whether they meet it nearer than that (B, V, cells) bool."""
    slope = direction[..., 2]
    along = (ground - origin[:, :, None, 2]) / torch.where(slope < _LEVEL, slope, _LEVEL)
    points = origin[:, :, None, :2] + along[..., None] * direction[..., :2]
    distance = points.norm(dim=-1)
    meets = (slope < _LEVEL) & (along > 0) & (distance < reach)
    return points * (reach / distance.clamp(min=reach))[..., None], meets

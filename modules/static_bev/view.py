"""From the images of a rig to the ground: every cell looks into the cameras at points above it."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels import deformable_aggregation
from ..operations import OperationModule
from ..positions import sinusoidal
from ..projection import project
from ..settings import Count, Metres
from .grid import BevGrid

_OWN_POINT = 2.0  # logit by which a head begins with points of its own, so that no two of them say the same


@dataclass
class ViewConfig:
    """Settings of a `GroundView`."""

    heights: tuple[Metres, ...] = (-0.5, 0.0, 0.5, 1.5)  # metres above the ground at which a cell looks
    places: Count = 2  # at each height, spread over the cell (4, 9, … on a square lattice) and moved as it learns
    heads: Count = 8  # groups of channels with sampling weights of their own
    learned: bool = True  # False: fixed places and equal weights; with heights=(0,) and places=1 plain projection (IPM)


class GroundView(OperationModule):
    """Deformable attention from ground cells into the images (Zhu et al. 2021; Li et al. 2022, "BEVFormer").

    A cell's reference points stand above it at several heights. Where round them it samples, and how much each sample
    counts, follows from where the cell lies; weights sum to one over what lies in an image, so a camera that is missing
    leaves a cell to the others, and a cell that none sees is zero before the last convolution.

    Args:
        grid: of the cells.
        in_channels: C of the images' maps.
        channels: C of the ground's map.
        config: see `ViewConfig`.
    """

    def __init__(self, grid: BevGrid, in_channels: int, channels: int, config: ViewConfig):
        super().__init__()
        self.grid, self.config = grid, config
        self.points = len(config.heights) * config.places
        centres = grid.centres().flatten(0, 1)  # (A, 2)
        span = torch.tensor([grid.x[1] - grid.x[0], grid.y[1] - grid.y[0]], dtype=torch.float64)
        places = grid.size * _spread(config.places)
        plane = (centres[:, None] + places).repeat(1, len(config.heights), 1)  # (A, P, 2)
        height = torch.tensor(config.heights, dtype=torch.float64).repeat_interleave(config.places)
        points = torch.cat([plane, height[:, None].expand(len(plane), -1, 1)], dim=-1)
        self.register_buffer("reference", points.float(), persistent=False)  # (A, P, 3)
        if config.learned:
            place = sinusoidal((centres - grid.origin) / span, 64).float()
            self.register_buffer("place", place, persistent=False)
            self.query = nn.Sequential(nn.Linear(64, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU())
            self.offset = nn.Linear(channels, 2 * self.points)
            self.weight = nn.Linear(channels, self.points * config.heads)
            for layer in (self.offset, self.weight):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            point, head = torch.arange(self.points)[:, None], torch.arange(config.heads)
            self.weight.bias.data += _OWN_POINT * ((point - head) % min(self.points, config.heads) == 0).flatten()
        self.out = nn.Linear(in_channels, channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(
        self,
        maps: list[torch.Tensor],
        projection: torch.Tensor,
        image_size: tuple[int, int],
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks from every cell into the images.

        Args:
            maps: for each scale (B, V, C, h, w); get gradients.
            projection: (B, V, 4, 4) float32, ego points to pixels.
            image_size: height, width.
            visible: (B, V) bool, False = this camera is missing; None = all are there.

        Returns:
            The ground (B, channels, rows, columns), not negative, and (B, 1, rows, columns) whether any camera sees a
            cell, 0 or 1.
        """
        points, logits = self.reference, None
        if self.config.learned:
            query = self.query(self.place)
            moved = self.offset(query).float().unflatten(-1, (self.points, 2)) * self.grid.size
            points = points + torch.cat([moved, torch.zeros_like(moved[..., :1])], dim=-1)
            logits = self.weight(query).float().unflatten(-1, (self.points, 1, 1, self.config.heads))
        batch, cameras = projection.shape[:2]
        seen = project(points.expand(batch, *points.shape), projection, image_size)  # (B, A, P, V, 2)
        inside = ((seen > 0) & (seen < 1)).all(-1)
        if visible is not None:
            inside = inside & visible[:, None, None].to(inside.device)
        weights = self._weights(logits, inside, len(maps))
        options = dict(visible=None if visible is None else visible.to(seen.device), backend=self.backend)
        found = deformable_aggregation(maps, seen, weights, **options)  # (B, A, C)
        any_camera = inside.flatten(2).any(-1).to(found.dtype)  # (B, A)
        ground = self.out(found) * any_camera[..., None]
        ground = ground.transpose(1, 2).unflatten(2, self.grid.shape)
        return self.smooth(ground), any_camera.unflatten(1, self.grid.shape)[:, None]

    def _weights(self, logits, inside, levels):
        """(B, A, P, V, levels, heads), sums to one over the points, cameras and levels that count."""
        counts = inside[..., None, None].expand(-1, -1, -1, -1, levels, self.config.heads if logits is not None else 1)
        if logits is None:
            weights = counts.float()
        else:
            weights = torch.exp(logits - logits.amax(dim=1, keepdim=True).detach()) * counts
        return weights / weights.sum((2, 3, 4), keepdim=True).clamp(min=1e-9)


def _spread(places):
    """(places, 2) float64, parts of a cell's side: a square lattice where their number is a square, else a diagonal."""
    side = math.isqrt(places)
    if side * side != places:
        line = (torch.arange(places, dtype=torch.float64) + 0.5) / places - 0.5
        return torch.stack([line, line], dim=-1)
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    return torch.cartesian_prod(line, line)

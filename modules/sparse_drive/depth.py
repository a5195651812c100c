"""Depth from feature maps: a side task, without which detection from nothing hardly begins to learn."""

from dataclasses import dataclass

import torch
from torch import nn

from ..settings import Count, Positive
from .layers import full_precision, widened


@dataclass
class DepthConfig:
    levels: Count = 3  # of the finest maps
    focal: Positive = 100.0  # pixels; of a camera whose depth is what the layer says
    max_depth: Positive = 60.0  # metres


class DepthBranch(nn.Module):
    """Predicts the depth of each cell of the finest maps (Sparse4D v2)."""

    def __init__(self, config: DepthConfig, channels: int):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(config.levels))

    def forward(self, maps: list[torch.Tensor], focal: torch.Tensor) -> list[torch.Tensor]:
        """maps (B, V, C, h, w) of each scale, focal (B, V) pixels → (B, V, h, w) metres for the finest ones."""
        depths = []
        for layer, level in zip(self.layers, maps):
            with full_precision(level):
                (wide,) = widened(level)
                depth = layer(wide.flatten(0, 1)).exp().view(*level.shape[:2], *level.shape[3:])
                depths.append(depth * (focal.to(depth) / self.config.focal)[..., None, None])
        return depths

    def loss(self, depths: list[torch.Tensor], truth: list[torch.Tensor]) -> torch.Tensor:
        """Mean distance to the truth (B, V, h, w) metres, where that is positive (0, NaN: unknown), over the levels."""
        errors = []
        for depth, known in zip(depths, truth, strict=True):
            where = (known > 0) & depth.isfinite()
            error = torch.where(where, depth.clamp(0, self.config.max_depth) - known.nan_to_num(), 0).abs()
            errors.append(error.sum() / where.sum().clamp(min=1))
        return torch.stack(errors).mean()

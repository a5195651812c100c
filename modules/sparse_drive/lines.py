"""Anchors that are map lines: polylines of points (x, y) in metres, ego frame, one after another."""

import torch
from torch import nn

from .boxes import Refined
from .layers import PRIOR_BIAS, full_precision, mlp, widened


def move(anchor: torch.Tensor, now_T_then: torch.Tensor, interval: torch.Tensor | None = None) -> torch.Tensor:
    """Lines of another moment in the present ego frame: (B, N, points · 2), by now_T_then (B, 4, 4). They stand still,
    so `interval` changes nothing."""
    points = anchor.unflatten(-1, (-1, 2))
    rotation, translation = now_T_then[:, None, None, :2, :2], now_T_then[:, None, None, :2, 3]
    return ((rotation * points[..., None, :]).sum(-1) + translation).flatten(-2)


class LineEncoder(nn.Module):
    """Embeds lines by all their points at once."""

    def __init__(self, channels: int, points: int):
        super().__init__()
        self.position = mlp(channels, linears=1, norms=2, inputs=2 * points)

    def forward(self, anchor: torch.Tensor) -> torch.Tensor:
        """(…, points · 2) → (…, C), in the anchor's precision."""
        with full_precision(anchor):
            return self.position(anchor)


class LineKeypoints(nn.Module):
    """Where a line is looked at: at each of its points, at some heights about the ground, at places near by.

    Args:
        channels: C of the instances.
        points: of a line.
        heights: metres above the ground at which every point is looked at.
        learned: places near by, for each point and height.
        ground: height of the ground, metres, ego frame.
    """

    def __init__(self, channels: int, points: int, heights: tuple[float, ...], learned: int, ground: float):
        super().__init__()
        self.points, self.learned = points, learned
        self.register_buffer("heights", torch.tensor(heights) + ground, persistent=False)
        self.count = points * len(heights) * learned
        self.offset = nn.Linear(channels, 2 * self.count)
        nn.init.xavier_uniform_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, anchor: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """anchor (B, N, points · 2), feature (B, N, C) → (B, N, keypoints, 3) metres, ego frame."""
        with full_precision(anchor):
            (feature,) = widened(feature)
            offset = self.offset(feature).unflatten(-1, (self.points, len(self.heights), self.learned, 2))
            place = anchor.unflatten(-1, (self.points, 1, 1, 2)) + offset
            height = self.heights.to(place)[:, None, None].expand(*place.shape[:-1], 1)
            return torch.cat([place, height], dim=-1).flatten(2, 4)


class LineRefinement(nn.Module):
    """Moves the points of lines and says what the lines are."""

    def __init__(self, channels: int, classes: int, points: int):
        super().__init__()
        self.offset = mlp(channels, linears=2, norms=2).append(nn.Linear(channels, 2 * points))
        self.scale = nn.Parameter(torch.ones(2 * points))
        self.classes = mlp(channels, linears=1, norms=2).append(nn.Linear(channels, classes))
        nn.init.constant_(self.classes[-1].bias, PRIOR_BIAS)

    def forward(
        self, feature: torch.Tensor, anchor: torch.Tensor, embedding: torch.Tensor, interval: torch.Tensor
    ) -> Refined:
        """feature, embedding (B, N, C), anchor (B, N, points · 2); a line has no velocity and no quality."""
        with full_precision(anchor):
            feature, embedding = widened(feature, embedding)
            offset = self.offset(feature + embedding) * self.scale
            return Refined(anchor + offset, self.classes(feature), None)

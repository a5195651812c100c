"""Augmentation in bird's-eye view: of points, boxes and, through its matrix, projections."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BevAugmentation:
    """Mirrors the ego frame, then turns it about z, then scales it.

    Args:
        rotation: radians, counter-clockwise seen from above.
        scale: factor on all lengths.
        flip_x: x becomes −x.
        flip_y: y becomes −y.
    """

    rotation: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False

    @property
    def matrix(self) -> torch.Tensor:
        """augmented_T_ego, (4, 4) float64. No rigid transform: it scales, and mirrors."""
        cos, sin = self.scale * math.cos(self.rotation), self.scale * math.sin(self.rotation)
        x, y = (-1 if flip else 1 for flip in (self.flip_x, self.flip_y))
        rows = [[x * cos, -y * sin, 0, 0], [x * sin, y * cos, 0, 0], [0, 0, self.scale, 0], [0, 0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)

    def points(self, points: torch.Tensor) -> torch.Tensor:
        """Moves points (P, 3 + …), whose first three columns are x, y, z."""
        turn = self.matrix[:3, :3].to(points)
        return torch.cat([points[:, :3] @ turn.T, points[:, 3:]], dim=1)

    def boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Moves boxes (G, 9), columns as in `DetectionInput.boxes`; velocities scale too, as distances do."""
        turn = self.matrix[:3, :3].to(boxes)
        centre, size, yaw, velocity = boxes.split((3, 3, 1, 2), dim=1)
        heading = torch.cat([yaw.cos(), yaw.sin()], dim=1) @ turn[:2, :2].T
        yaw = torch.atan2(heading[:, 1:], heading[:, :1])
        return torch.cat([centre @ turn.T, size * self.scale, yaw, velocity @ turn[:2, :2].T], dim=1)

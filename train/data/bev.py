"""Augmentation in bird's-eye view: of points, boxes and, through its matrix, projections."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BevAugmentation:
    """Mirrors the ego frame, then turns it about z, then scales it, then moves it.

    Args:
        rotation: radians, counter-clockwise seen from above.
        scale: factor on all lengths.
        flip_x: x becomes −x.
        flip_y: y becomes −y.
        translation: metres along x, y and z.
    """

    rotation: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def matrix(self) -> torch.Tensor:
        """augmented_T_ego, (4, 4) float64. No rigid transform: it scales, and mirrors."""
        dx, dy, dz = self.translation
        cos, sin = self.scale * math.cos(self.rotation), self.scale * math.sin(self.rotation)
        x, y = (-1 if flip else 1 for flip in (self.flip_x, self.flip_y))
        rows = [[x * cos, -y * sin, 0, dx], [x * sin, y * cos, 0, dy], [0, 0, self.scale, dz], [0, 0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)

    def points(self, points: torch.Tensor) -> torch.Tensor:
        """Moves points (P, 3 + …), whose first three columns are x, y, z."""
        turn, shift = self.matrix[:3].to(points).split((3, 1), dim=1)
        return torch.cat([points[:, :3] @ turn.T + shift[:, 0], points[:, 3:]], dim=1)

    def boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Moves boxes (G, 9), columns as in `DetectionInput.boxes`; velocities scale too, as distances do."""
        turn, shift = self.matrix[:3].to(boxes).split((3, 1), dim=1)
        centre, size, yaw, velocity = boxes.split((3, 3, 1, 2), dim=1)
        heading = torch.cat([yaw.cos(), yaw.sin()], dim=1) @ turn[:2, :2].T
        yaw = torch.atan2(heading[:, 1:], heading[:, :1])
        return torch.cat([centre @ turn.T + shift[:, 0], size * self.scale, yaw, velocity @ turn[:2, :2].T], dim=1)

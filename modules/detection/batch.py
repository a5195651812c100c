"""What the detector takes."""

from dataclasses import dataclass

import torch


@dataclass
class DetectionInput:
    """A batch of key frames, as a detector takes it. "Ego" is the reference ego frame, or the LiDAR's where the data
    are in that one, in training after the augmentation in bird's-eye view.

    Images, points, boxes and labels are on one device; the projections stay on the CPU.
    """

    images: torch.Tensor  # (B, V, 3, H, W) float32, normalised
    image_T_ego: torch.Tensor  # (B, V, 4, 4) float64, see `RigFrame`
    points: list[torch.Tensor]  # B of (P, 5) float32: x, y, z (metres, ego), intensity in [0, 1], lag (seconds)
    boxes: list[torch.Tensor]  # B of (G, 9) float32: centre x, y, z, length, width, height, yaw, vx, vy (NaN = unknown)
    labels: list[torch.Tensor]  # B of (G,) int64, places in DETECTION_CLASSES
    tokens: list[str]  # of the samples
    ego_T_frame: torch.Tensor | None = None  # (B, 4, 4) float64, CPU: to the reference ego frame; None = they are in it

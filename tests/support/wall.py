"""A rig that drives along a wall which all of its cameras face: ego motion in whole cells, without a network."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from rigfuse.modules.rig import NUSCENES_CAMERAS, Camera, RigFrame

STRIDE, FOCAL, DISTANCE = 8, 100.0, 20.0  # pixels per cell, pixels, metres
_FORWARD = STRIDE * DISTANCE / FOCAL  # metres that move the wall by one cell
_YAW = 0.6
_WORLD_T_START = torch.tensor(
    [
        [math.cos(_YAW), -math.sin(_YAW), 0, 300.0],
        [math.sin(_YAW), math.cos(_YAW), 0, -200.0],
        [0, 0, 1, 2.0],
        [0, 0, 0, 1],
    ],
    dtype=torch.float64,
)
# The camera looks to the left, so its image's right is ahead.
_CAM_T_EGO = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)


def wall_frame(
    cells: float, size: tuple[int, int], *, time: float = 0.0, shift: float = 0.0, batch: int = 1, scene: str = "wall"
) -> RigFrame:
    """The rig after it has driven so many cells along the wall. What a camera now shows in column u it showed in column
    u + `cells` at the start. Its image was cut `shift` cells further to the left than usual: it shows in column
    u + `shift` what it would show in column u."""
    height, width = (STRIDE * cells_of_side for cells_of_side in size)
    centre = (width - 1) / 2 + STRIDE * shift
    intrinsics = torch.tensor([[FOCAL, 0, centre], [0, FOCAL, (height - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    camera = Camera("wall", width, height, intrinsics, _CAM_T_EGO)
    moved = torch.eye(4, dtype=torch.float64)
    moved[0, 3] = cells * _FORWARD
    views = camera.image_T_ego.expand(batch, len(NUSCENES_CAMERAS), 4, 4)
    pose = (_WORLD_T_START @ moved).expand(batch, 4, 4)
    return RigFrame(views, pose, torch.full((batch,), time, dtype=torch.float64), (scene,) * batch)


class Pooling(nn.Module):
    """A backbone that a person can follow: averages of pixels, three channels."""

    strides = (STRIDE,)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images):
        return [F.avg_pool2d(images * self.gain, STRIDE)]


def image_of(features: torch.Tensor) -> torch.Tensor:
    """The image (..., 3, H·STRIDE, W·STRIDE) of which `Pooling` makes the features (..., 3, H, W)."""
    return features.repeat_interleave(STRIDE, -2).repeat_interleave(STRIDE, -1)

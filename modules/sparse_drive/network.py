"""The whole network: images → maps → (completion) → the driving head."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.runtime.nvtx import annotate
from ..backbones import PyramidConfig, ResNetFPN
from ..rig import RigFrame
from .depth import DepthBranch, DepthConfig
from .head import DriveOutput, DriveState, HeadConfig


@dataclass
class SparseDriveConfig:
    """Settings of the whole network."""

    backbone: PyramidConfig = field(
        default_factory=lambda: PyramidConfig(frozen_stages=-1, norm_eval=False, strides=(4, 8, 16, 32))
    )
    head: HeadConfig = field(default_factory=HeadConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)

    def build(self) -> "SparseDrive":
        backbone = ResNetFPN(self.backbone, self.head.channels)
        self.head.levels = len(self.backbone.strides)
        return SparseDrive(backbone, self.head.build(), DepthBranch(self.depth, self.head.channels))


def tiny() -> SparseDriveConfig:
    """The same network with smaller numbers: it trains on a two-core machine."""
    config = SparseDriveConfig()
    config.backbone.resnet, config.backbone.strides = "tiny", (8, 16)
    head, depth = config.head, config.depth
    head.channels, head.heads, depth.levels = 64, 4, 2
    head.detection.anchors, head.detection.kept, head.detection.layers = 120, 40, 2
    head.lines.anchors, head.lines.kept, head.lines.layers = 24, 8, 2
    head.lines.points, head.lines.heights, head.lines.learned_keypoints = 10, (0.0, 0.5), 1
    for part in (head.detection, head.lines):
        part.dropout = part.deformable.keypoint_dropout = 0.0
    head.motion.layers, head.motion.agents, head.motion.lines = 1, 20, 5
    return config


def padded(images: torch.Tensor, step: int) -> torch.Tensor:
    """Images (…, H, W) with zeros below and to the right, up to a multiple of `step`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % step, 0, -height % step))


class SparseDrive(nn.Module):
    """Images of a moment to a plan, moment after moment.

    Args:
        backbone: gives one map of the head's channels for each scale.
        head: see `SparseDriveHead`.
        depth: the side task.
    """

    def __init__(self, backbone: ResNetFPN, head: nn.Module, depth: DepthBranch):
        super().__init__()
        self.backbone, self.head, self.depth = backbone, head, depth

    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, int]]:
        """(B, V, 3, H, W), normalised → for each scale (B, V, C, h, w), and the size (H, W) of the images that the maps
        are of: padded with zeros below and to the right, to a multiple of the coarsest stride."""
        images = padded(images, self.backbone.strides[-1])
        with annotate("sparse_drive.backbone"):
            flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            maps = [level.unflatten(0, images.shape[:2]) for level in self.backbone(flat)]
        return maps, tuple(images.shape[-2:])

    def forward(
        self,
        images: torch.Tensor,
        frame: RigFrame,
        state: DriveState | None = None,
        *,
        visible: torch.Tensor | None = None,
        ego_status: torch.Tensor | None = None,
        complete: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> tuple[DriveOutput, DriveState, list[torch.Tensor]]:
        """images (B, V, 3, H, W), normalised; the rest as for `SparseDriveHead`. `complete` stands between backbone and
        head. Returns what the head does, and the maps that the head saw."""
        maps, size = self.extract(images)
        if complete is not None:
            maps = complete(maps)
        return *self.head(maps, frame, size, state, visible=visible, ego_status=ego_status), maps

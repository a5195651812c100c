"""The driving network with completion in front: missing cameras are completed before the head sees the maps."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..camera_dropout import DropoutConfig
from ..completion.cascade import CascadeConfig, CompletionCascade
from ..completion.planning_guided import PlanningConfig
from ..completion.stage import TemporalConfig
from ..completion.vae import VAEConfig
from ..rig import NUSCENES_CAMERAS
from .depth import DepthBranch
from .network import SparseDriveConfig, padded


@dataclass
class CompletedDriveConfig(SparseDriveConfig):
    """Settings of `SparseDriveConfig` and of the stages of completion, see `CascadeConfig`."""

    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    @property
    def cascade(self) -> CascadeConfig:
        """The settings of completion, with the backbone and the channels of the head."""
        return CascadeConfig(
            self.head.channels, self.backbone, self.dropout, self.temporal, self.vae, self.planning
        )  # fmt: skip

    def validate(self) -> None:
        """Holds settings of different parts to one another; ValueError names the setting."""
        self.cascade.validate()
        if tuple(self.head.cameras) != NUSCENES_CAMERAS:
            raise ValueError(f"head.cameras are {self.head.cameras}, completion needs {NUSCENES_CAMERAS}")

    def build(self) -> "CompletedDrive":
        self.head.levels = len(self.backbone.strides)
        head, depth = self.head.build(), DepthBranch(self.depth, self.head.channels)
        return CompletedDrive(self.cascade.build(), head, depth)


class CompletedDrive(CompletionCascade):
    """Images of a moment, some cameras of which may be missing, to a plan; moment after moment.

    Its parts have the names that they have in `SparseDrive` and in `CompletionCascade`, so weights of both fit.

    Args:
        cascade: whose backbone and stages are taken.
        head, depth: as of `SparseDrive`.
    """

    def __init__(self, cascade: CompletionCascade, head: nn.Module, depth: DepthBranch):
        super().__init__(cascade.backbone, cascade.dropout, cascade.temporal, cascade.vae, cascade.planning)
        self.trajectory_source, self.vae_at_inference = cascade.trajectory_source, cascade.vae_at_inference
        self.head, self.depth = head, depth
        self.backend = cascade.backend

    def _maps(self, images):
        """Of padded images, whose sides are multiples of the maps'."""
        return super()._maps(padded(images, self.backbone.strides[-1]))

    def image_size(self, images: torch.Tensor) -> tuple[int, int]:
        """Height and width of the images that the maps are of."""
        return tuple(padded(images[:1, :1], self.backbone.strides[-1]).shape[-2:])

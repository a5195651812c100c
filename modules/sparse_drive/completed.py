"""The driving network with completion in front: missing cameras are completed before the head sees the maps."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..camera_dropout import DropoutConfig
from ..completion.cascade import CascadeConfig, CompletionCascade
from ..completion.planning_guided import PlanningConfig
from ..completion.stage import TemporalConfig
from ..completion.vae import VAEConfig
from ..rig import NUSCENES_CAMERAS, RigFrame
from .depth import DepthBranch
from .head import DriveOutput
from .network import SparseDriveConfig, padded
from .results import ResultConfig, choose_plans


@dataclass
class CompletedDriveConfig(SparseDriveConfig):
    """Settings of `SparseDriveConfig` and of the stages of completion, see `CascadeConfig`."""

    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    # Of stage 3: none; the plan of the moment before, which inference has too; or the way that was driven, in training.
    trajectory: Literal["none", "predicted", "ground_truth"] = "none"

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
        if self.trajectory == "predicted" and not self.head.with_motion:
            raise ValueError("trajectory is 'predicted', needs head.with_motion")

    def build(self) -> "CompletedDrive":
        self.head.levels = len(self.backbone.strides)
        head, depth = self.head.build(), DepthBranch(self.depth, self.head.channels)
        return CompletedDrive(self.cascade.build(), head, depth, self.trajectory)


class CompletedDrive(CompletionCascade):
    """Images of a moment, some cameras of which may be missing, to a plan; moment after moment.

    Its parts have the names that they have in `SparseDrive` and in `CompletionCascade`, so weights of both fit.

    Args:
        cascade: whose backbone and stages are taken.
        head, depth: as of `SparseDrive`.
        trajectory: see `CompletedDriveConfig`.
    """

    def __init__(self, cascade: CompletionCascade, head: nn.Module, depth: DepthBranch, trajectory: str = "none"):
        super().__init__(cascade.backbone, cascade.dropout, cascade.temporal, cascade.vae, cascade.planning)
        self.head, self.depth, self.trajectory = head, depth, trajectory
        self.backend = cascade.backend

    def _maps(self, images):
        """Of padded images, whose sides are multiples of the maps'."""
        return super()._maps(padded(images, self.backbone.strides[-1]))

    def image_size(self, images: torch.Tensor) -> tuple[int, int]:
        """Height and width of the images that the maps are of."""
        return tuple(padded(images[:1, :1], self.backbone.strides[-1]).shape[-2:])

    def trajectory_of(
        self, driven: torch.Tensor | None, last: tuple[DriveOutput, RigFrame] | None, command: torch.Tensor,
        frame: RigFrame,
    ) -> torch.Tensor | None:  # fmt: skip
        """What stage 3 is told about where the vehicle goes, (B, F, 2) metres in the present ego frame.

        Args:
            driven: (B, F, 2) places that were driven; None in inference.
            last: output and frame of the moment before.
            command: (B,), see `read_results`.
            frame: of the present.
        """
        if self.trajectory == "ground_truth":
            return driven
        if self.trajectory == "none" or last is None:
            return None
        output, then = last
        _, plan = choose_plans(output, command, self.head.config.ego, ResultConfig(rescore=False))
        now_T_then = torch.linalg.solve(frame.world_T_ego, then.world_T_ego).to(plan)
        moved = plan @ now_T_then[:, :2, :2].mT + now_T_then[:, None, :2, 3]
        # Another drive has no plan of before.
        same = torch.tensor([a == b for a, b in zip(then.scene, frame.scene)], device=plan.device)
        return moved.masked_fill(~same[:, None, None], torch.nan)

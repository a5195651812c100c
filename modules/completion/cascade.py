"""The cascade: images → camera dropout → backbone → stage 1 temporal → stage 2 VAE → stage 3 planning-guided.

System A of the design documents up to the features. A driving head takes `CascadeOutput.features` from here.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ...kernels.runtime.nvtx import annotate
from ..backbones import PyramidConfig, ResNetFPN
from ..camera_dropout import DropoutConfig, RandCamMask
from ..operations import OperationModule
from ..rig import RigFrame
from ..window import RigWindow
from .planning_guided import PlanningConfig, PlanningGuidedCompletion
from .temporal import MotionCompensatedTemporalCompletion, TemporalConfig
from .vae import PVReconVAE, VAEConfig


@dataclass
class CascadeConfig:
    """Settings of the cascade."""

    channels: int = 256  # of every scale
    backbone: PyramidConfig = field(default_factory=PyramidConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    def build(self, backend: str | None = None) -> "CompletionCascade":
        """Builds the cascade with the enabled stages; `backend` is that of the operations, see `rigfuse.kernels`."""
        strides, channels, temporal, vae, planning = self.backbone.strides, self.channels, None, None, None
        if self.temporal.enable:
            temporal = MotionCompensatedTemporalCompletion(channels, self.temporal)
        if self.vae.enable:
            vae = PVReconVAE(len(strides), channels, self.vae)
        if self.planning.enable:
            planning = PlanningGuidedCompletion(strides, channels, self.planning)
        backbone, dropout = ResNetFPN(self.backbone, channels), RandCamMask(self.dropout)
        cascade = CompletionCascade(backbone, dropout, temporal, vae, planning)
        cascade.backend = backend
        return cascade.to(memory_format=torch.channels_last)  # that of the maps, and so of the weights' gradients


@dataclass
class CascadeOutput:
    """What the cascade makes of the present moment of a window."""

    features: list[torch.Tensor]  # completed, for each scale (B, V, C, H, W)
    original: list[torch.Tensor]  # before completion
    missing: torch.Tensor  # (B, V) bool
    teacher: list[torch.Tensor] | None  # from the full images
    importance: list[torch.Tensor] | None  # of the trajectory, for each scale (B, V, H, W)
    losses: dict[str, torch.Tensor]  # unweighted scalars: ssl, vae_rec, vae_kl, planning_guided


class CompletionCascade(OperationModule):
    """Completes the features of missing cameras; every stage is optional. `backend` is that of all their operations.

    The student sees the masked images and carries the gradients. The teacher is the same backbone on the full images,
    without gradients. With nothing but completion losses keep the backbone frozen: features that may move could agree
    by becoming constant.

    Args:
        backbone: gives one map for each stride.
        dropout: which cameras go missing in training, and on request in evaluation.
        temporal: stage 1, at the scale whose stride it names.
        vae: stage 2. Runs in training, and in place of stage 1 where a sample has no history at all.
        planning: stage 3.
        trajectory_dropout: share of the training samples that have no trajectory, as in inference: or the coarse path
            would never learn to complete the cells that the vehicle is about to drive over.
    """

    def __init__(
        self,
        backbone: ResNetFPN,
        dropout: RandCamMask,
        temporal: MotionCompensatedTemporalCompletion | None = None,
        vae: PVReconVAE | None = None,
        planning: PlanningGuidedCompletion | None = None,
        *,
        trajectory_dropout: float = 0.5,
    ):
        super().__init__()
        if temporal is not None and temporal.stride not in backbone.strides:
            raise ValueError(f"temporal.stride is {temporal.stride}, the backbone has strides {backbone.strides}")
        self.backbone, self.dropout = backbone, dropout
        self.temporal, self.vae, self.planning = temporal, vae, planning
        self.trajectory_dropout = trajectory_dropout

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Turns images (B, V, 3, H, W) into maps (B, V, C, h, w) for each stride, in channels_last memory format."""
        maps = self.backbone(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return [x.contiguous(memory_format=torch.channels_last).unflatten(0, images.shape[:2]) for x in maps]

    def forward(self, window: RigWindow, drop=None) -> CascadeOutput:
        """Completes the present moment of a window.

        Args:
            window: the moments; the history is read from the earlier ones, all of whose cameras are present.
            drop: cameras to drop now instead of a random draw: names, or a (B, V) bool mask.

        Returns:
            features, teacher and losses. Losses are absent outside training; `trajectory` is used in training only.
        """
        present = window.images[:, -1]
        masked, missing = self.dropout(present, drop)
        with annotate("backbone"):
            original = self.extract(masked)
            with torch.no_grad():
                teacher = self.extract(present)
                earlier = window.images[:, :-1].unbind(1) if self.temporal is not None else ()
                history = [self.extract(images)[self.temporal_scale] for images in earlier]
        trajectory = self._with_dropout(window.trajectory) if self.training else None
        features, importance, losses = self.complete(
            original, history, missing, window.frames, trajectory=trajectory, teacher=teacher
        )
        if self.training:
            losses = {**losses, **consistency_losses(features, teacher, missing, importance)}
        return CascadeOutput(features, original, missing, teacher, importance, losses)

    def _with_dropout(self, trajectory):
        if trajectory is None:
            return None
        dropped = torch.rand(len(trajectory), dtype=torch.float32) < self.trajectory_dropout
        return trajectory.masked_fill(dropped.to(trajectory.device)[:, None, None], torch.nan)

    @property
    def temporal_scale(self) -> int:
        """The index of the scale that stage 1 completes."""
        return self.backbone.strides.index(self.temporal.stride)

    def complete(
        self,
        original: list[torch.Tensor],
        history: list[torch.Tensor],
        missing: torch.Tensor,
        frames: list[RigFrame],
        *,
        history_missing: torch.Tensor | None = None,
        trajectory: torch.Tensor | None = None,
        teacher: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, dict[str, torch.Tensor]]:
        """Runs the three stages on features.

        Args:
            original: for each scale (B, V, C, H, W).
            history: of the earlier moments, oldest first, the scale that stage 1 completes.
            missing: (B, V) bool.
            frames: of the earlier moments and the present.
            history_missing: (T, B, V) bool, cameras that were missing then; None = nobody.
            trajectory: (B, F, 2) metres in the present ego frame.
            teacher: the VAE's target.

        Returns:
            features, the trajectory's importance on each scale or None, and the VAE's losses.
        """
        features, helped = self._temporal(original, history, missing, frames, history_missing)
        losses, importance = {}, None
        if self.vae is not None and self.training:
            replace = missing & ~helped.any(dim=1, keepdim=True)
            features, losses = self.vae(features, replace, teacher)
        if self.planning is not None:
            features, importance = self.planning(features, missing, frames[-1], trajectory)
        return features, importance, losses

    def _temporal(self, features, history, missing, frames, history_missing):
        if self.temporal is None:
            return features, torch.zeros_like(missing)
        if history_missing is None:
            history_missing = missing.new_zeros(len(history), *missing.shape)
        earlier = self.temporal.new_history()
        for past, absent, frame in zip(history, history_missing, frames):
            earlier.push(past, absent, frame)
        scale = self.temporal_scale
        completed, helped = self.temporal.complete(features[scale], missing, frames[-1], earlier)
        return [*features[:scale], completed, *features[scale + 1 :]], helped


def consistency_losses(
    features: list[torch.Tensor],
    teacher: list[torch.Tensor],
    missing: torch.Tensor,
    importance: list[torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Measures how far the missing cameras' features are from the teacher's; zero (with gradient) when none is missing.

    `ssl`: squared error relative to the teacher's mean square, plus one minus the cosine of each cell, mean over the
    scales. `planning_guided`: the same relative error weighted by the trajectory's importance; present with one.
    """
    ssl, guided = [], []
    for scale, (x, target) in enumerate(zip(features, teacher)):
        x, target = x[missing].float(), target[missing].float()  # (Nq, C, H, W)
        if len(x) == 0:
            ssl.append(features[scale].sum() * 0)
            continue
        error = (x - target).square().mean(dim=1) / target.square().mean().clamp(min=1e-6)
        ssl.append(error.mean() + (1 - F.cosine_similarity(x, target, dim=1)).mean())
        if importance is not None:
            weight = importance[scale][missing]
            guided.append((error * weight).sum() / weight.sum().clamp(min=1.0))
    losses = dict(ssl=torch.stack(ssl).mean())
    if guided:
        losses["planning_guided"] = torch.stack(guided).mean()
    return losses

"""The cascade: images → camera dropout → backbone → stage 1 temporal → stage 2 VAE → stage 3 planning-guided.

System A of the design documents up to the features. A driving head takes `CascadeOutput.features` from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ...kernels.runtime.nvtx import annotate
from ..attention import check_heads
from ..backbones import PyramidConfig, ResNetFPN
from ..camera_dropout import DropoutConfig, RandCamMask
from ..history import HistoryQueue, PyramidHistory
from ..maps import replace_maps, wanted_maps
from ..operations import OperationModule
from ..rig import RigFrame
from ..settings import Count
from ..window import RigWindow
from .consistency import consistency_losses
from .fusion import ConfidenceFusion
from .motion import moved_to_now, repeated_motion
from .planning_guided import PlanningConfig, PlanningGuidedCompletion
from .stage import TemporalConfig, TemporalStage
from .temporal import MotionCompensatedTemporalCompletion
from .temporal_v3 import MotionCompensatedTemporalCompletionV3
from .vae import PVReconVAE, VAEConfig

TRAJECTORY_STEPS = 6  # of a predicted trajectory


@dataclass
class CascadeConfig:
    """Settings of the cascade."""

    channels: Count = 256  # of every scale
    backbone: PyramidConfig = field(default_factory=PyramidConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    parallel: bool = False  # the stages side by side, joined by confidence, instead of one after another
    consistency: bool = False  # a loss that holds a completion to the one of the moment before, where it lies now

    def validate(self) -> None:
        """Holds settings of different stages to one another; ValueError names the setting."""
        for name in ("temporal", "planning"):
            stage = getattr(self, name)
            if stage.enable:
                check_heads(f"{name}.heads", stage.heads, self.channels)
        if self.temporal.enable and self.temporal.stride not in self.backbone.strides:
            raise ValueError(f"temporal.stride is {self.temporal.stride}, needs one of {self.backbone.strides}")

    def build(self, backend: str | None = None) -> "CompletionCascade":
        """Builds the cascade with the enabled stages; `backend` is that of the operations, see `rigfuse.kernels`."""
        strides, channels, temporal, vae, planning = self.backbone.strides, self.channels, None, None, None
        if self.temporal.enable and self.temporal.geometry:
            temporal = MotionCompensatedTemporalCompletionV3(channels, strides, self.temporal)
        elif self.temporal.enable:
            temporal = MotionCompensatedTemporalCompletion(channels, self.temporal)
        if self.vae.enable:
            vae = PVReconVAE(len(strides), channels, self.vae)
        if self.planning.enable:
            planning = PlanningGuidedCompletion(strides, channels, self.planning)
        backbone, dropout = ResNetFPN(self.backbone, channels), RandCamMask(self.dropout)
        cascade = CompletionCascade(backbone, dropout, temporal, vae, planning)
        cascade.trajectory_source, cascade.consistency = self.planning.trajectory_source, self.consistency
        cascade.vae_at_inference = self.vae.at_inference
        if self.parallel:
            cascade.join_by_confidence(channels)
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
    without gradients. Unless the backbone takes statistics from its batch, one pass over the full images and one black
    image serves both, and of the past only those cameras are looked at that help a missing one. With nothing but
    completion losses keep the backbone frozen: features that may move could agree by becoming constant.

    Args:
        backbone: gives one map for each stride.
        dropout: which cameras go missing in training, and on request in evaluation.
        temporal: stage 1, at the scale whose stride it names, or V3 at every one.
        vae: stage 2. Fills what stage 1 leaves empty: cameras that no history helps and, with V1 and V2, all scales but
            theirs.
        planning: stage 3.
        trajectory_dropout: share of the training samples that have no trajectory, as in inference: or the coarse path
            would never learn to complete the cells that the vehicle is about to drive over.
    """

    def __init__(
        self,
        backbone: ResNetFPN,
        dropout: RandCamMask,
        temporal: TemporalStage | None = None,
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
        self.trajectory_source, self.consistency, self.vae_at_inference = "ground_truth", False, True
        self.fusion = None

    def join_by_confidence(self, channels: int) -> None:
        """Lets the stages work side by side on what came in; a predicted confidence joins them, cell by cell."""
        branches = sum(stage is not None for stage in (self.temporal, self.vae, self.planning))
        self.fusion = nn.ModuleList(ConfidenceFusion(channels, branches) for _ in self.backbone.strides)

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Turns images (B, V, 3, H, W) into maps (B, V, C, h, w) for each stride, in channels_last memory format."""
        return [x.unflatten(0, images.shape[:2]) for x in self._maps(images.flatten(0, 1))]

    def forward(self, window: RigWindow, drop=None) -> CascadeOutput:
        """Completes the present moment of a window.

        Args:
            window: the moments; the history is read from the earlier ones.
            drop: cameras to drop instead of a random draw, see `RandCamMask.faults`: names or a (B, V) bool mask,
                missing in the present alone; or a (B, T, V) bool mask.

        Returns:
            features, teacher and losses. Losses are absent outside training; `trajectory` is used in training only.
        """
        missing = self.dropout.faults(*window.images.shape[:2], drop).cpu()  # (B, T, V)
        now = missing[:, -1]
        with annotate("backbone"):
            original, teacher = self._see(window.images[:, -1], now)
            history, before = self._remember(window, missing, original)
        now = now.to(window.images.device)
        trajectory = self.guidance(window.frames, window.trajectory)
        features, importance, losses = self.complete(
            original, now, window.frames[-1], history, trajectory=trajectory, teacher=teacher
        )
        if self.training:
            losses = {**losses, **consistency_losses(features, teacher, now, importance)}
            if self.consistency:
                losses["temporal"] = self._temporal_consistency(window, missing, before, original, features)
        return CascadeOutput(features, original, now, teacher, importance, losses)

    def stream(self, images: torch.Tensor, missing: torch.Tensor, frame: RigFrame) -> list[torch.Tensor]:
        """Completes the present moment of a rig that is running, with one pass of the backbone.

        Call it once per moment, in temporal order, in evaluation. The past is carried in the history of stage 1
        (`temporal.history`), which forgets it for each sample at a scene change, after a gap, or when time runs
        backwards; `temporal.reset_history()` forgets all. The result is that of `forward` on a window of the moments
        that the history holds.

        Args:
            images: (B, V, 3, H, W), normalised; those of missing cameras are not read.
            missing: (B, V) bool.
            frame: the rig at this moment.

        Returns:
            for each stride (B, V, C, h, w), completed.
        """
        missing = missing.cpu()
        with annotate("backbone"):
            features = self._fill(images, missing)
        missing, history = missing.to(images.device), None if self.temporal is None else self.temporal.history
        past = [then.frame for then in history.frames[:1]] if history is not None else []
        completed, _, _ = self.complete(features, missing, frame, history, trajectory=self.guidance([*past, frame]))
        if history is not None:
            history.push(self.for_temporal(features), missing, frame)
        return completed

    def for_temporal(self, features: list[torch.Tensor]):
        """What stage 1 and its history take of the features of every scale: all of them, or those of its own scale."""
        return features if self.temporal.every_scale else features[self.temporal_scale]

    @property
    def temporal_scale(self) -> int:
        """The index of the scale that stage 1 refines, which V1 and V2 complete."""
        return self.backbone.strides.index(self.temporal.stride)

    def complete(
        self,
        original: list[torch.Tensor],
        missing: torch.Tensor,
        frame: RigFrame,
        history: HistoryQueue | PyramidHistory | None = None,
        *,
        trajectory: torch.Tensor | None = None,
        teacher: list[torch.Tensor] | None = None,
        every: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, dict[str, torch.Tensor]]:
        """Runs the three stages on features.

        Args:
            original: for each scale (B, V, C, H, W).
            missing: (B, V) bool.
            frame: the rig at this moment.
            history: earlier moments at what stage 1 completes; what cannot be the past of `frame` is forgotten.
                Needed with stage 1.
            trajectory: (B, F, 2) metres in the present ego frame.
            teacher: the VAE's target.
            every: works on the maps of every camera and keeps those of the missing ones, so that no shape hangs on a
                value, see `StreamingCompletion`.

        Returns:
            features, the trajectory's importance on each scale or None, and the VAE's losses.
        """
        if self.fusion is not None:
            return self._side_by_side(original, missing, frame, history, trajectory, teacher, every)
        features, helped = self._stage_1(original, missing, frame, history, every)
        losses, importance = {}, None
        if self.vae is not None and (self.training or self.vae_at_inference):
            left = self._left(missing, helped)
            features, losses = self.vae(features, missing, left, teacher if self.training else None, every=every)
        if self.planning is not None:
            features, importance = self.planning(features, missing, frame, trajectory, every=every)
        return features, importance, losses

    def _stage_1(self, original, missing, frame, history, every):
        """The features of every scale after stage 1, and who was helped by it."""
        features, helped = original, torch.zeros_like(missing)
        if self.temporal is not None:
            features, helped = self.temporal.complete(self.for_temporal(original), missing, frame, history, every=every)
            if not self.temporal.every_scale:
                scale = self.temporal_scale
                features = [*original[:scale], features, *original[scale + 1 :]]
        return features, helped

    def _left(self, missing, helped):
        """Whom stage 1 left as they were, for each scale (B, V) bool."""
        if self.temporal is None or self.temporal.every_scale:
            return [missing & ~helped for _ in self.backbone.strides]
        scale = self.temporal_scale
        return [missing & ~helped if index == scale else missing for index in range(len(self.backbone.strides))]

    def _side_by_side(self, original, missing, frame, history, trajectory, teacher, every):
        """`complete`, the stages not one after another but each on what came in."""
        branches, importance, losses = [], None, {}
        if self.temporal is not None:
            branches.append(self._stage_1(original, missing, frame, history, every)[0])
        if self.vae is not None:
            every_one = [missing] * len(original)
            rebuilt, losses = self.vae(original, missing, every_one, teacher if self.training else None, every=every)
            branches.append(rebuilt)
        if self.planning is not None:
            guided, importance = self.planning(original, missing, frame, trajectory, every=every)
            branches.append(guided)
        if not every and not missing.any():
            return original, importance, losses
        index, features = wanted_maps(missing, every), []
        for x, fusion, *completions in zip(original, self.fusion, *branches):
            joined = fusion([completion[index] for completion in completions])
            only = missing if every else None
            features.append(replace_maps(x, index, lambda _, joined=joined: joined, only=only))
        return features, importance, losses

    def guidance(self, frames: Sequence[RigFrame], driven: torch.Tensor | None = None) -> torch.Tensor | None:
        """The trajectory (B, F, 2) that guides stage 3, see `PlanningConfig.trajectory_source`.

        Args:
            frames: the moments that are known, the present last.
            driven: (B, F, 2), the one that was driven; used in training alone, and not for every sample.
        """
        if self.trajectory_source == "predicted":
            return repeated_motion(frames[-2] if len(frames) > 1 else None, frames[-1], TRAJECTORY_STEPS)
        return self._with_dropout(driven) if self.training and self.trajectory_source == "ground_truth" else None

    # ---- the backbone

    def _maps(self, images):
        """Images (N, 3, H, W) → maps (N, C, h, w) for each stride, in channels_last memory format."""
        maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return [x.contiguous(memory_format=torch.channels_last) for x in maps]

    def _one_pass(self) -> bool:
        """Whether an image's maps depend on that image alone, so that it does not matter what it is processed with."""
        return not any(
            isinstance(module, _BatchNorm | _DropoutNd) and module.training for module in self.backbone.modules()
        )

    def _black(self, images):
        """The maps (1, 1, C, h, w) of one black image of this size: what the backbone sees of any missing camera."""
        return self.extract(images.new_zeros(1, 1, *images.shape[2:]))

    def _see(self, images, missing):
        """What the backbone makes of the masked images, and of the full ones without gradients, (B, V, C, h, w) each;
        missing is on the CPU.

        Both differ in the missing cameras alone, and there the masked one is the same black image each time. So one
        pass over the full images serves both, where an image does not depend on the others of its batch.
        """
        if not self._one_pass():
            original = self.extract(self.dropout(images, missing)[0])
            with torch.no_grad():
                return original, self.extract(images)
        full = self.extract(images)
        teacher = [x.detach() for x in full]
        if not missing.any():
            return full, teacher
        absent = missing.to(images.device)[:, :, None, None, None]
        return [torch.where(absent, dark, x) for dark, x in zip(self._black(images), full)], teacher

    def _fill(self, images, missing):
        """What the backbone makes of the present images; black where a camera is missing. missing is on the CPU."""
        if not missing.any():
            return self.extract(images)
        filled = [dark.expand(*missing.shape, -1, -1, -1).clone() for dark in self._black(images)]
        return _put(filled, ~missing, self._maps, images)

    @torch.no_grad()
    def _remember(self, window, missing, original):
        """The earlier moments as stage 1 may read them: of each sample the cameras that help a missing one. And the
        newest of them with the history that it had: (maps of every scale, what was read (B, V), history)."""
        if self.temporal is None:
            return None, None
        history, present, before = self.temporal.new_history(), len(window.frames) - 1, None
        helpful = self.temporal.helpful(missing[:, -1])
        first = max(present - history.length, 0) if helpful.any() else present
        for step in range(first, present):
            images, read = window.images[:, step], helpful & ~missing[:, step]
            if self._one_pass():
                maps = _put([torch.zeros_like(x) for x in original], read, self._maps, images)
            else:
                maps = self.extract(images)
            if step == present - 1:
                before = maps, read, history.fork()
            history.push(self.for_temporal(maps), ~read, window.frames[step])
        return history, before

    def _temporal_consistency(self, window, missing, before, original, features):
        """How far the completion of cameras that are missing for longer is from their completion a moment ago, where
        that lies now: squared error relative to the mean square; zero (with gradient) where there are none."""
        lasting = missing[:, -1] & missing[:, -2] if before is not None else missing[:, -1] & False
        if not lasting.any():
            return sum(x.sum() for x in features) * 0
        maps, read, history = before
        there = read.to(window.images.device)[:, :, None, None, None]
        dark = [torch.where(there, x, black.detach()) for x, black in zip(maps, original)]  # now these are black too
        with torch.no_grad():
            gone = (~read).to(window.images.device)
            earlier, _, _ = self.complete(dark, gone, window.frames[-2], history)
        errors, lasting = [], lasting.to(window.images.device)
        for stride, x, then in zip(self.backbone.strides, features, earlier):
            moved, seen = moved_to_now(then.to(x.dtype), *window.frames[-2:], stride, self.temporal.depths.tolist())
            error = (x[lasting] - moved[lasting]).float().square().mean(dim=1)
            seen = (seen[lasting] > 0.5).float()
            scale = moved[lasting].float().square().mean().clamp(min=1e-6)
            errors.append((error * seen).sum() / seen.sum().clamp(min=1) / scale)
        return torch.stack(errors).mean()

    def _with_dropout(self, trajectory):
        if trajectory is None:
            return None
        dropped = torch.rand(len(trajectory), dtype=torch.float32) < self.trajectory_dropout
        return trajectory.masked_fill(dropped.to(trajectory.device)[:, None, None], torch.nan)


def _put(filled, chosen, backbone, images):
    """Writes the maps of the chosen (B, V) images into those that lie there, in place."""
    if chosen.any():
        index = chosen.nonzero().to(images.device).unbind(1)
        for maps, x in zip(filled, backbone(images[index])):
            maps[index] = x.to(maps.dtype)
    return filled

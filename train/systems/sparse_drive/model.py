"""The driving network as it is trained: a window's earlier moments warm the instances up, the last one is learned."""

from dataclasses import dataclass

import torch

from ....modules.completion.cascade import consistency_losses
from ....modules.rig import RigFrame
from ....modules.sparse_drive.completed import CompletedDrive, CompletedDriveConfig
from ....modules.sparse_drive.depth import DepthBranch
from ....modules.sparse_drive.head import DriveOutput
from ....modules.sparse_drive.losses import LossConfig, drive_losses
from ....modules.sparse_drive.network import SparseDrive, SparseDriveConfig
from .data import DriveBatch

# Maps of the present moments of a batch, the size of the images they are of, and who is there (B, V) bool.
Present = tuple[list[torch.Tensor], tuple[int, int], torch.Tensor | None]


@dataclass
class TrainingOutput:
    losses: dict[str, torch.Tensor]  # unweighted scalars
    output: DriveOutput  # of the present


class DrivingModel(SparseDrive):
    """`SparseDrive` that takes batches of windows.

    Earlier moments pass without gradient and hand on instances, as in a drive; the present one has the losses. The
    backbone's statistics see all of them.
    """

    matching: LossConfig

    @classmethod
    def of(cls, config: SparseDriveConfig, matching: LossConfig) -> "DrivingModel":
        """Builds the network of a configuration."""
        built = config.build()
        model = cls(built.backbone, built.head, built.depth)
        model.matching = matching
        return model

    def forward(self, batch: DriveBatch) -> TrainingOutput:
        """The losses of a batch of windows on the model's device."""
        state, last = None, len(batch.frames) - 1
        for step, frame in enumerate(batch.frames):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                images, status = batch.images[:, step], batch.status[:, step]
                output, state, maps = super().forward(images, frame, state, ego_status=status)
        losses = drive_losses(output, batch.truth, self.head.config, self.matching).total
        return TrainingOutput(losses | depth_loss(self.depth, maps, batch), output)

    def present(self, batch: DriveBatch, missing: torch.Tensor | None = None, hide: bool = True) -> Present:
        """What the head is given of the present moments of a batch.

        Args:
            batch: on the model's device.
            missing: (B, V) bool, whose images are black; None = nobody's.
            hide: the head does not look at missing cameras; False = it looks at what the backbone makes of black.
        """
        images = batch.images[:, -1]
        if missing is None:
            return *self.extract(images), None
        missing = missing.to(images.device)
        images = images.masked_fill(missing[:, :, None, None, None], 0)
        return *self.extract(images), ~missing if hide else None


class CompletedModel(CompletedDrive):
    """`CompletedDrive` that takes batches of windows: cameras go missing, as `RandCamMask` draws it, and the losses of
    completion join those of the head. The rest is as in `DrivingModel`."""

    matching: LossConfig

    @classmethod
    def of(cls, config: CompletedDriveConfig, matching: LossConfig) -> "CompletedModel":
        """Builds the network of a configuration."""
        built = config.build()
        model = cls(built, built.head, built.depth)
        model.matching = matching
        return model

    def forward(self, batch: DriveBatch) -> TrainingOutput:
        """The losses of a batch of windows on the model's device."""
        size, last = self.image_size(batch.images[:, -1]), len(batch.frames) - 1
        missing = self.dropout.faults(*batch.images.shape[:2]).cpu()
        history = None if self.temporal is None else self.temporal.new_history()
        state = None
        for step, frame in enumerate(batch.frames):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                original, teacher = self._see(batch.images[:, step], missing[:, step])
                absent = missing[:, step].to(original[0].device)
                driven = batch.truth.ego_future.cumsum(1) if step == last else None
                way = self.guidance(batch.frames[max(step - 1, 0) : step + 1], driven)
                features, importance, losses = self.complete(
                    original, absent, frame, history, trajectory=way, teacher=teacher
                )
                if history is not None:
                    history.push(self.for_temporal(original), absent, frame)
                output, state = self.head(features, frame, size, state, ego_status=batch.status[:, step])
        losses = losses | consistency_losses(features, teacher, absent, importance)
        losses = losses | drive_losses(output, batch.truth, self.head.config, self.matching).total
        return TrainingOutput(losses | depth_loss(self.depth, original, batch, absent), output)

    def present(self, batch: DriveBatch, missing: torch.Tensor | None = None, hide: bool = True) -> Present:
        """As for `DrivingModel`, but what is missing is completed, so the head looks at all cameras.

        Call it in temporal order: completion remembers.
        """
        images, frame = batch.images[:, -1], batch.frames[-1]
        if missing is None:
            missing = torch.zeros(images.shape[:2], dtype=torch.bool)
        found = []
        for index in range(len(images)):
            rows = slice(index, index + 1)
            found.append(self.stream(images[rows], missing[rows].cpu(), frame.one(index)))
        return [torch.cat(levels) for levels in zip(*found)], self.image_size(images), None


def depth_loss(
    depth: DepthBranch, maps: list[torch.Tensor], batch: DriveBatch, missing: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The loss of the side task over the cameras that are there, where the batch has depth."""
    if not batch.depth:
        return {}
    focal, truth = focal_lengths(batch.frames[-1]).to(maps[0].device), batch.depth
    if missing is not None:
        truth = [level.masked_fill(missing[:, :, None, None], 0) for level in truth]
    return dict(depth=depth.loss(depth(maps, focal), truth))


def focal_lengths(frame: RigFrame) -> torch.Tensor:
    """Focal length of each camera, (B, V) float32 pixels: how far the image moves when a point one metre away does so
    along the image's rows."""
    across, ahead = frame.image_T_ego[..., 0, :3], frame.image_T_ego[..., 2, :3]
    return (across - (across * ahead).sum(-1, keepdim=True) * ahead).norm(dim=-1).float()

"""The driving network as it is trained: a window's earlier moments warm the instances up, the last one is learned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....modules.rig import RigFrame
from ....modules.sparse_drive.anchors import Anchors
from ....modules.sparse_drive.head import DriveOutput, DriveState
from ....modules.sparse_drive.losses import LossConfig, drive_losses
from ....modules.sparse_drive.network import SparseDrive, SparseDriveConfig
from .data import DriveBatch


@dataclass
class TrainingOutput:
    losses: dict[str, torch.Tensor]  # unweighted scalars
    output: DriveOutput  # of the present


class DrivingModel(SparseDrive):
    """`SparseDrive` that takes batches of windows.

    Earlier moments pass without gradient and hand on instances, as in a drive; the present one has the losses. The
    backbone's statistics see all of them.
    """

    @classmethod
    def of(cls, config: SparseDriveConfig, matching: LossConfig, anchors: Anchors | None = None) -> "DrivingModel":
        """Builds the network of a configuration; its instances begin as `anchors`, None = spread evenly."""
        built = config.build()
        model = cls(built.backbone, built.head, built.depth)
        model.matching = matching
        if anchors is not None:
            model.head.set_anchors(anchors)
        return model

    def drive(
        self,
        images: torch.Tensor,
        frame: RigFrame,
        state: DriveState | None = None,
        *,
        status: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        complete: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> tuple[DriveOutput, DriveState, list[torch.Tensor]]:
        """One moment, see `SparseDrive.forward`; status (B, 10) is the measured one."""
        settings = dict(visible=visible, ego_status=status, complete=complete)
        return super().forward(images, frame, state, **settings)

    def forward(self, batch: DriveBatch) -> TrainingOutput:
        """The losses of a batch of windows on the model's device."""
        state = None
        with torch.no_grad():
            for step, frame in enumerate(batch.frames[:-1]):
                _, state, _ = self.drive(batch.images[:, step], frame, state, status=batch.status[:, step])
        output, _, maps = self.drive(batch.images[:, -1], batch.frames[-1], state, status=batch.status[:, -1])
        losses = drive_losses(output, batch.truth, self.head.config, self.matching).total
        if batch.depth:
            focal = focal_lengths(batch.frames[-1]).to(maps[0].device)
            losses["depth"] = self.depth.loss(self.depth(maps, focal), batch.depth)
        return TrainingOutput(losses, output)


def focal_lengths(frame: RigFrame) -> torch.Tensor:
    """Focal length of each camera, (B, V) float32 pixels: how far the image moves when a point one metre away does so
    along the image's rows."""
    across, ahead = frame.image_T_ego[..., 0, :3], frame.image_T_ego[..., 2, :3]
    return (across - (across * ahead).sum(-1, keepdim=True) * ahead).norm(dim=-1).float()

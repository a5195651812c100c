"""A drive in the mirror: left is right, in the images, the rig, the poses and the truth."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ....modules.rig import RigFrame
from ....modules.sparse_drive.losses import DriveTruth
from ....modules.sparse_drive.motion import COMMANDS

if TYPE_CHECKING:
    from .data import DriveBatch

_WORLD = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
_BOX = torch.tensor([1.0, -1, 1, 1, 1, 1, -1, 1, -1])  # x, y, z, length, width, height, yaw, vx, vy
_STATUS = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1])  # accelerations, turn rates, velocities, steering
_POINT = torch.tensor([1.0, -1.0])
_COMMAND = torch.tensor([COMMANDS.index(name) for name in ("left", "right", "straight")])
_SIDES = {"LEFT": "RIGHT", "RIGHT": "LEFT"}


def mirrored(batch: "DriveBatch", cameras: Sequence[str]) -> "DriveBatch":
    """The batch as it would be in a world in which left and right are swapped; the mirror of the mirror is the batch.

    The image of a left camera, flipped, is what the right one sees: it takes its place and, mirrored, its calibration.
    Poses, boxes, lines, ways, commands and the vehicle's status follow.

    Args:
        batch: on the CPU, without depth, whose cells may not lie mirrored: see `mirrored_points`.
        cameras: names, in the order of the images.

    Raises:
        ValueError: a camera has no partner on the other side.
    """
    assert not batch.depth
    order, width = partners(cameras), batch.images.shape[-1]
    image = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    image[0, 2] = width - 1
    frames = [
        RigFrame((image @ f.image_T_ego @ _WORLD)[:, order], _WORLD @ f.world_T_ego @ _WORLD, f.timestamp, f.scene)
        for f in batch.frames
    ]
    return replace(
        batch, images=batch.images[:, :, order].flip(-1), frames=frames, status=batch.status * _STATUS,
        truth=mirrored_truth(batch.truth),
        others=[[boxes * _BOX[:7].numpy().astype(np.float64) for boxes in steps] for steps in batch.others],
        velocity=batch.velocity * _POINT.double(),
    )  # fmt: skip


def mirrored_truth(truth: DriveTruth) -> DriveTruth:
    """What is true in the mirror."""
    each = lambda values, signs: None if values is None else [value * signs for value in values]  # noqa: E731
    return DriveTruth(
        boxes=each(truth.boxes, _BOX), labels=truth.labels,
        lines=each(truth.lines, _POINT), line_labels=truth.line_labels,
        futures=each(truth.futures, _POINT), future_known=truth.future_known,
        ego_future=truth.ego_future * _POINT, ego_future_known=truth.ego_future_known,
        command=_COMMAND[truth.command], ego_status=truth.ego_status * _STATUS,
    )  # fmt: skip


def mirrored_points(points: torch.Tensor) -> torch.Tensor:
    """Points (P, 3 or more) of the ego frame in the mirror; x, y, z first."""
    return torch.cat([points[:, :1], -points[:, 1:2], points[:, 2:]], dim=1)


def partners(cameras: Sequence[str]) -> list[int]:
    """For each camera the place of that on the other side: LEFT and RIGHT in its name are swapped."""
    names = ["_".join(_SIDES.get(part, part) for part in name.split("_")) for name in cameras]
    lacking = sorted(set(names) - set(cameras))
    if lacking:
        raise ValueError(f"cameras are {', '.join(cameras)}; a mirrored drive needs {', '.join(lacking)} too")
    return [list(cameras).index(name) for name in names]

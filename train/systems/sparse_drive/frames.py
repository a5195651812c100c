"""Drives in the frame of the LiDAR, which released weights of SparseDrive know: x right, y ahead, z up."""

from dataclasses import replace

import numpy as np
import torch

from ....modules.rig import RigFrame
from ....modules.sparse_drive.losses import DriveTruth
from ...data.files import BadFile
from ...data.moments import Moment


def ego_T_lidar(moment: Moment) -> torch.Tensor:
    """(4, 4) float64, where the LiDAR of the key frame is in its ego frame; BadFile where there is none."""
    sweeps = moment.sweeps(1)
    if not sweeps:
        raise BadFile(f"LIDAR_TOP of {moment.token}")
    return sweeps[0].ego_T_lidar


def in_frame(frame: RigFrame, ego_T_frame: torch.Tensor) -> RigFrame:
    """The rig as seen from another frame: what it calls ego is then that. ego_T_frame (4, 4) float64."""
    poses = (matrix @ ego_T_frame for matrix in (frame.image_T_ego, frame.world_T_ego))
    return RigFrame(*poses, frame.timestamp, frame.scene)


def truth_in_frame(truth: DriveTruth, ego_T_frame: torch.Tensor) -> DriveTruth:
    """Truth of the ego frame in another one. Map lines lie on the ground, z = 0 of the ego frame; commands and the
    vehicle's status are about the vehicle and stay."""
    frame_T_ego = torch.linalg.inv(ego_T_frame)
    turn = frame_T_ego[:2, :2].float()
    steps = lambda values: None if values is None else [value @ turn.T for value in values]  # noqa: E731
    lines = [moved_points(line, frame_T_ego) for line in truth.lines]
    boxes = [moved_boxes(box, frame_T_ego) for box in truth.boxes]
    way = None if truth.ego_future is None else truth.ego_future @ turn.T
    return replace(truth, boxes=boxes, lines=lines, futures=steps(truth.futures), ego_future=way)


def moved_boxes(boxes: torch.Tensor, b_T_a: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 7 or more) of frame a in frame b: x, y, z, length, width, height, yaw, and vx, vy, vz as far as they
    are there. Boxes stay upright: of a frame that leans a little only the turn about z counts for the yaw."""
    rotation, translation = b_T_a[:3, :3].to(boxes), b_T_a[:3, 3].to(boxes)
    yaw = torch.atan2(b_T_a[1, 0], b_T_a[0, 0]).to(boxes)
    heading = boxes[:, 6:7] + yaw
    heading = torch.atan2(heading.sin(), heading.cos())
    speed = boxes[:, 7:]
    size = speed.shape[1]
    parts = [boxes[:, :3] @ rotation.T + translation, boxes[:, 3:6], heading, speed @ rotation[:size, :size].T]
    return torch.cat(parts, dim=1)


def moved_points(points: torch.Tensor, b_T_a: torch.Tensor) -> torch.Tensor:
    """Points (…, 2) at z = 0 of frame a, their x and y in frame b."""
    return points @ b_T_a[:2, :2].to(points).T + b_T_a[:2, 3].to(points)


def turned_paths(paths: torch.Tensor, ego_T_frame: torch.Tensor) -> torch.Tensor:
    """Paths (…, 2) that begin at a frame's origin, in its axes, along the axes of the ego frame: x ahead."""
    return paths @ ego_T_frame[:2, :2].to(paths).T


def shifted_boxes(boxes: np.ndarray, ego_T_frame: torch.Tensor) -> np.ndarray:
    """Boxes (n, 7 or more) of the ego frame about the other frame's origin, along the axes of the ego frame."""
    shifted = np.array(boxes, dtype=np.float64)
    shifted[:, :2] -= ego_T_frame[:2, 3].numpy()
    return shifted

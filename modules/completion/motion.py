"""What the rig's own motion says: where it will drive, and where what a camera showed lies now."""

from collections.abc import Sequence

import torch

from ...kernels import multi_depth_warp
from ..rig import RigFrame, relative_projection


def repeated_motion(before: RigFrame | None, now: RigFrame, steps: int) -> torch.Tensor | None:
    """Where the rig will be if it goes on as it did: (B, steps, 2) float32 metres in the present ego frame.

    NaN for samples whose scene changed, None without a moment before.
    """
    if before is None:
        return None
    then_T_now = torch.linalg.solve(before.world_T_ego, now.world_T_ego)
    pose, places = torch.eye(4, dtype=torch.float64).expand_as(then_T_now).to(then_T_now.device), []
    for _ in range(steps):
        pose = pose @ then_T_now
        places.append(pose[:, :2, 3])
    other = torch.tensor([a != b for a, b in zip(before.scene, now.scene)], device=pose.device)
    return torch.stack(places, dim=1).masked_fill(other[:, None, None], torch.nan).float()


def moved_to_now(
    features: torch.Tensor, before: RigFrame, now: RigFrame, stride: int, depths: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every camera's earlier features (B, V, C, H, W) where they lie in its own view now: the mean over the depths that
    see any, and the share of the depths that do, (B, V, H, W)."""
    before_T_now = torch.linalg.solve(before.world_T_ego, now.world_T_ego)[:, None]
    projection = relative_projection(now.image_T_ego, before.image_T_ego, before_T_now, stride=stride)
    flat = features.flatten(0, 1)
    planes = torch.tensor(depths, dtype=torch.float32, device=flat.device)
    warped, coverage = multi_depth_warp(flat, projection.flatten(0, 1).to(flat.device), planes)
    moved = warped / coverage[:, None].clamp(min=1e-3)
    return moved.unflatten(0, features.shape[:2]), coverage.unflatten(0, features.shape[:2])

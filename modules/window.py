"""A batch of consecutive moments: what a network that looks back in time takes."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from .rig import RigFrame


@dataclass
class RigWindow:
    """Consecutive moments of a batch of rigs, oldest first; the last one is the present."""

    images: torch.Tensor  # (B, T, V, 3, H, W), normalised
    frames: list[RigFrame]  # T of them
    trajectory: torch.Tensor | None = None  # (B, F, 2) metres, the ego's future in the present ego frame

    def __post_init__(self):
        """ValueError where images, frames and trajectory are not of one batch, or a scene's time runs backwards."""
        if self.images.ndim != 6 or self.images.shape[3] != 3:
            raise ValueError(f"RigWindow: images has shape {tuple(self.images.shape)}, needs (B, T, V, 3, H, W)")
        batch, moments, views = self.images.shape[:3]
        if len(self.frames) != moments:
            raise ValueError(f"RigWindow: {len(self.frames)} frames for images of {moments} moments")
        for place, frame in enumerate(self.frames):
            got = frame.image_T_ego.shape[:2]
            if got != (batch, views):
                needed = f"needs ({batch}, {views}) as the images have"
                raise ValueError(f"RigWindow: frames[{place}] has (batch, cameras) = {tuple(got)}, {needed}")
        for place, (earlier, later) in enumerate(pairwise(self.frames)):
            same = torch.tensor([a == b for a, b in zip(earlier.scene, later.scene)], dtype=torch.bool)
            if (same & (later.timestamp < earlier.timestamp).cpu()).any():
                raise ValueError(f"RigWindow: frames[{place + 1}] is earlier than frames[{place}], needs oldest first")
        path = self.trajectory
        if path is not None and (path.ndim != 3 or path.shape[0] != batch or path.shape[2] != 2):
            raise ValueError(f"RigWindow: trajectory has shape {tuple(path.shape)}, needs ({batch}, F, 2)")

    def to(self, device: torch.device | str) -> "RigWindow":
        """Images and trajectory on the device. Poses stay where they are: they are float64 and small."""
        trajectory = None if self.trajectory is None else self.trajectory.to(device, non_blocking=True)
        return RigWindow(self.images.to(device, non_blocking=True), self.frames, trajectory)

"""A batch of consecutive moments: what a network that looks back in time takes."""

from dataclasses import dataclass

import torch

from .rig import RigFrame


@dataclass
class RigWindow:
    """Consecutive moments of a batch of rigs, oldest first; the last one is the present."""

    images: torch.Tensor  # (B, T, V, 3, H, W), normalised
    frames: list[RigFrame]  # T of them
    trajectory: torch.Tensor | None = None  # (B, F, 2) metres, the ego's future in the present ego frame

    def to(self, device: torch.device | str) -> "RigWindow":
        """Images and trajectory on the device. Poses stay where they are: they are float64 and small."""
        trajectory = None if self.trajectory is None else self.trajectory.to(device, non_blocking=True)
        return RigWindow(self.images.to(device, non_blocking=True), self.frames, trajectory)

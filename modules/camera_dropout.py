"""Cameras that go missing, for training and for evaluation without them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .rig import NUSCENES_CAMERAS, camera_index


@dataclass
class DropoutConfig:
    """Settings of `RandCamMask`: with chance `p_missing` a sample loses `n_min` to `n_max` cameras."""

    p_missing: float = 0.6
    n_min: int = 1
    n_max: int = 2


class RandCamMask(nn.Module):
    """Blacks out whole cameras, all equally likely and without replacement (design documents' `RandCamMask`).

    Apply it to normalised images: the mean is subtracted then, and a missing camera is zero for the backbone.

    Args:
        config: see `DropoutConfig`; None = its defaults.
        cameras: names of the V cameras in the order of the images.
    """

    def __init__(self, config: DropoutConfig | None = None, *, cameras: Sequence[str] = NUSCENES_CAMERAS):
        super().__init__()
        config = config or DropoutConfig()
        if not 0 <= config.p_missing <= 1:
            raise ValueError(f"RandCamMask: p_missing is {config.p_missing}, needs a probability")
        if not 0 <= config.n_min <= config.n_max <= len(cameras):
            needed = f"0 ≤ n_min ≤ n_max ≤ {len(cameras)} cameras"
            raise ValueError(f"RandCamMask: n_min is {config.n_min} and n_max is {config.n_max}, needs {needed}")
        self.p_missing, self.n_min, self.n_max = config.p_missing, config.n_min, config.n_max
        self.cameras = tuple(cameras)

    def forward(
        self,
        images: torch.Tensor,
        drop: Sequence[str] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks a batch.

        Args:
            images: (B, V, 3, H, W); left as they are. Gets gradients where not missing.
            drop: what to drop instead of drawing: camera names (for every sample; an empty list drops none) or a bool
                mask (B, V). None draws in training and drops nothing in evaluation.
            generator: of the draw, on the CPU; None = torch's own.

        Returns:
            The masked images in their dtype and memory format, and `missing` (B, V) bool, True = missing, on their
            device. Where nothing is missing the images come back themselves, not a copy.
        """
        if images.ndim != 5 or images.shape[1] != len(self.cameras):
            needed = f"(B, {len(self.cameras)}, 3, H, W)"
            raise ValueError(f"RandCamMask: images has shape {tuple(images.shape)}, needs {needed}")
        if isinstance(drop, torch.Tensor):
            missing = self._from_mask(drop, images)
        elif drop is not None:
            missing = self._from_names(drop, len(images))
        elif self.training:
            missing = self._draw(len(images), generator)
        else:
            missing = torch.zeros(images.shape[:2], dtype=torch.bool)
        nothing = not missing.is_cuda and not missing.any()  # asking a GPU would wait for it
        missing = missing.to(images.device)
        # not masked_fill, which loses the memory format
        return (images if nothing else torch.where(missing[:, :, None, None, None], 0, images)), missing

    def _from_mask(self, drop, images):
        if drop.dtype != torch.bool:
            dtype = str(drop.dtype).removeprefix("torch.")
            raise TypeError(f"RandCamMask: drop is {dtype}, needs bool or camera names")
        if drop.shape != images.shape[:2]:
            needed = tuple(images.shape[:2])
            raise ValueError(f"RandCamMask: drop has shape {tuple(drop.shape)}, needs (B, V) = {needed}")
        return drop

    def _from_names(self, drop, batch):
        if isinstance(drop, str):
            raise TypeError(f"RandCamMask: drop is the string {drop!r}, needs a list of camera names")
        missing = torch.zeros(batch, len(self.cameras), dtype=torch.bool)
        missing[:, [camera_index(name, self.cameras) for name in drop]] = True
        return missing

    def _draw(self, batch, generator):
        count = torch.randint(self.n_min, self.n_max + 1, (batch, 1), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < self.p_missing
        # The rank of each camera in a random order: those ranked below the count are a draw without replacement.
        rank = torch.rand(batch, len(self.cameras), generator=generator).argsort(dim=1).argsort(dim=1)
        return dropped & (rank < count)

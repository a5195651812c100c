"""Cameras that go missing, for training and for evaluation without them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .rig import NUSCENES_CAMERAS, camera_index
from .settings import Count, Share, Whole


@dataclass
class DropoutConfig:
    """Settings of `RandCamMask`: with chance `p_missing` a sample loses `n_min` to `n_max` cameras."""

    p_missing: Share = 0.6
    n_min: Whole = 1
    n_max: Whole = 2
    sticky: tuple[Count, Count] = (2, 3)  # moments that a fault lasts, from and to; a sample is any one of them
    p_from_start: Share = 0.1  # share of the faults that have lasted for as long as there is any history
    p_no_history: Share = 0.1  # share of the samples without history, as at the start of a drive
    ramp_steps: Whole = 0  # training batches over which p_missing and n_max rise from p_first and n_min; 0 = at once
    p_first: Share = 0.15

    def validate(self) -> None:
        """ValueError where the limits cross."""
        if self.n_min > self.n_max:
            raise ValueError(f"n_min is {self.n_min} and n_max is {self.n_max}, needs n_min ≤ n_max")
        if self.sticky[0] > self.sticky[1]:
            raise ValueError(f"sticky is {self.sticky}, needs to rise")


class RandCamMask(nn.Module):
    """Takes whole cameras away, all equally likely and without replacement (design documents' `RandCamMask`).

    Faults last: a camera that is missing now may have been missing for some moments, so that its own history is missing
    too. Of a fault that lasts L moments a sample shows any one, so 0 to L − 1 earlier ones are lost as well.

    Args:
        config: see `DropoutConfig`; None = its defaults.
        cameras: names of the V cameras in the order of the images.
    """

    def __init__(self, config: DropoutConfig | None = None, *, cameras: Sequence[str] = NUSCENES_CAMERAS):
        super().__init__()
        config = config or DropoutConfig()
        _check(config, len(cameras))
        self.config, self.cameras = config, tuple(cameras)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))  # batches, for the ramp

    def forward(
        self,
        images: torch.Tensor,
        drop: Sequence[str] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blacks out the missing cameras of one moment.

        Apply it to normalised images: the mean is subtracted then, and a missing camera is zero for the backbone.

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
        missing = self.faults(len(images), 1, drop, generator)[:, -1]
        nothing = not missing.is_cuda and not missing.any()  # asking a GPU would wait for it
        missing = missing.to(images.device)
        # not masked_fill, which loses the memory format
        return (images if nothing else torch.where(missing[:, :, None, None, None], 0, images)), missing

    def faults(
        self,
        batch: int,
        moments: int,
        drop: Sequence[str] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Says which cameras are missing at each of `moments` consecutive moments, the last of which is the present.

        Args:
            batch: B samples.
            moments: at least 1.
            drop: what to drop instead of drawing: camera names or a (B, V) bool mask, missing in the present alone; or
                a (B, moments, V) bool mask. None draws in training and drops nothing in evaluation.
            generator: of the draw, on the CPU; None = torch's own.

        Returns:
            (B, moments, V) bool, True = missing; on the CPU, or where the mask is.
        """
        if isinstance(drop, torch.Tensor):
            return self._from_mask(drop, batch, moments)
        missing = torch.zeros(batch, moments, len(self.cameras), dtype=torch.bool)
        if drop is not None:
            missing[:, -1] = self._from_names(drop)
        elif self.training:
            missing = self._draw(batch, moments, generator)
            self.drawn += 1
        return missing

    def _from_mask(self, drop, batch, moments):
        if drop.dtype != torch.bool:
            dtype = str(drop.dtype).removeprefix("torch.")
            raise TypeError(f"RandCamMask: drop is {dtype}, needs bool or camera names")
        views = len(self.cameras)
        if drop.shape == (batch, moments, views):
            return drop
        if drop.shape != (batch, views):
            needed = f"(B, V) = {(batch, views)} or (B, T, V) = {(batch, moments, views)}"
            raise ValueError(f"RandCamMask: drop has shape {tuple(drop.shape)}, needs {needed}")
        missing = drop.new_zeros(batch, moments, views)
        missing[:, -1] = drop
        return missing

    def _from_names(self, drop):
        if isinstance(drop, str):
            raise TypeError(f"RandCamMask: drop is the string {drop!r}, needs a list of camera names")
        missing = torch.zeros(len(self.cameras), dtype=torch.bool)
        missing[[camera_index(name, self.cameras) for name in drop]] = True
        return missing

    def _strength(self):
        """(p_missing, n_max) of this batch: the curriculum."""
        config = self.config
        share = 1.0 if config.ramp_steps == 0 else min(int(self.drawn) / config.ramp_steps, 1.0)
        p_missing = config.p_first + share * (config.p_missing - config.p_first)
        return p_missing, round(config.n_min + share * (config.n_max - config.n_min))

    def _draw(self, batch, moments, generator):
        config, (p_missing, n_max) = self.config, self._strength()
        uniform = lambda *shape: torch.rand(batch, *shape, generator=generator)  # noqa: E731
        count = torch.randint(config.n_min, n_max + 1, (batch, 1), generator=generator)
        # The rank of each camera in a random order: those ranked below the count are a draw without replacement.
        rank = uniform(len(self.cameras)).argsort(dim=1).argsort(dim=1)
        now = (uniform(1) < p_missing) & (rank < count)  # (B, V)

        shortest, longest = config.sticky
        lasts = torch.randint(shortest, longest + 1, (batch, 1), generator=generator)
        lost = (uniform(1) * lasts).long()  # (B, 1), earlier moments
        lost = torch.where(uniform(1) < config.p_from_start, moments, lost)
        ago = torch.arange(moments - 1, -1, -1)
        gone = now[:, None] & (ago <= lost)[..., None]  # (B, T, V)
        return gone | ((uniform(1) < config.p_no_history) & (ago > 0))[..., None]


def _check(config: DropoutConfig, views: int) -> None:
    for name in ("p_missing", "p_first", "p_from_start", "p_no_history"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"RandCamMask: {name} is {value}, needs a probability")
    if not 0 <= config.n_min <= config.n_max <= views:
        needed = f"0 ≤ n_min ≤ n_max ≤ {views} cameras"
        raise ValueError(f"RandCamMask: n_min is {config.n_min} and n_max is {config.n_max}, needs {needed}")
    if not 1 <= config.sticky[0] <= config.sticky[1]:
        raise ValueError(f"RandCamMask: sticky is {config.sticky}, needs at least 1 moment and to rise")
    if config.ramp_steps < 0:
        raise ValueError(f"RandCamMask: ramp_steps is {config.ramp_steps}, needs at least 0")

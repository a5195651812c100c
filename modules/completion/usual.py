"""What each camera usually sees: the running mean of its maps, cell by cell."""

import torch
import torch.nn.functional as F
from torch import nn

MOMENTUM = 0.02  # of the means, once they are of many batches


class UsualMaps(nn.Module):
    """Running means of each camera's features at every scale, as batch norm has them of a channel; zeros at first.

    Args:
        scales: number of scales.
        cameras: V.
        channels: C of every scale.
        grid: cells (height, width) that the means have; they are resized to the maps that they are compared with.
    """

    def __init__(self, scales: int, cameras: int, channels: int, grid: tuple[int, int]):
        super().__init__()
        self.scales = scales
        # (scales · V, C, *grid), in the memory format of the maps that they are taken from
        means = torch.zeros(scales * cameras, channels, *grid).contiguous(memory_format=torch.channels_last)
        self.register_buffer("means", means)
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))  # batches that the means are of

    @torch.no_grad()
    def learn(self, features: list[torch.Tensor], missing: torch.Tensor) -> None:
        """Updates the means by the cameras that are present: features, for each scale (B, V, C, H, W), and missing
        (B, V) bool."""
        present = (~missing).to(self.means)
        count = present.sum(0)
        self.counted += 1
        step = torch.where(count > 0, (1.0 / self.counted).clamp(min=MOMENTUM), 0.0)[:, None, None, None]
        for mean, x in zip(self.means.unflatten(0, (self.scales, -1)), features):
            total = torch.einsum("bv,bvchw->vchw", present, x.to(present.dtype))
            now = F.adaptive_avg_pool2d(total / count.clamp(min=1)[:, None, None, None], mean.shape[-2:])
            mean.lerp_(now, step.to(mean.dtype))

    def at(self, scale: int, camera: torch.Tensor | slice, like: torch.Tensor) -> torch.Tensor:
        """What the cameras at an index or slice usually show, of the size and dtype of `like`: (N, C, H, W)."""
        usual, size = self.means.unflatten(0, (self.scales, -1))[scale, camera], tuple(like.shape[-2:])
        if usual.shape[-2:] != size:
            usual = F.adaptive_avg_pool2d(usual, size)
        return usual.to(like.dtype)

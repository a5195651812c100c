"""Sinusoidal features of continuous coordinates, the common ground of every position encoding here."""

import math

import torch
from torch import nn


def sinusoidal(values: torch.Tensor, channels: int, max_frequency: float = 64.0) -> torch.Tensor:
    """Encodes each value by sines and cosines at geometrically spaced frequencies.

    Vaswani et al. 2017; Tancik et al. 2020.

    Args:
        values: (..., K), each about [0, 1].
        channels: length of the result; a multiple of 2K.
        max_frequency: highest frequency, in half periods over [0, 1].

    Returns:
        (..., channels) in the dtype of `values`.
    """
    axes = values.shape[-1]
    if channels % (2 * axes):
        raise ValueError(f"sinusoidal: channels is {channels}, needs a multiple of {2 * axes} for {axes} coordinates")
    bands = channels // (2 * axes)
    frequencies = torch.logspace(0, math.log2(max_frequency), bands, base=2.0, dtype=values.dtype, device=values.device)
    phases = (values[..., None] * (math.pi * frequencies)).flatten(-2)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


class CameraTimeSpaceEncoding(nn.Module):
    """Says which camera, how long ago, and where in the image a token comes from: one vector, added to the token.

    Time is continuous (seconds into the past), so irregular frame intervals need no slots; space is the token's centre
    relative to the map, so one encoding serves maps of different resolution.
    """

    def __init__(self, channels: int, cameras: int, horizon: float = 4.0):
        """Makes the encoding; `horizon` is the seconds that the time encoding spreads over."""
        super().__init__()
        self.channels, self.horizon = channels, horizon
        self.camera = nn.Embedding(cameras, channels)
        self.time = nn.Linear(channels, channels)
        self.space = nn.Linear(channels, channels)
        nn.init.normal_(self.camera.weight, std=0.02)

    def forward(self, camera: torch.Tensor, age: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Encodes the tokens of N maps, (N, H·W, channels): camera (N,) int, age (N,) seconds, size (H, W)."""
        height, width = size
        like = dict(dtype=self.space.weight.dtype, device=self.space.weight.device)
        y = (torch.arange(height, **like) + 0.5) / height
        x = (torch.arange(width, **like) + 0.5) / width
        cells = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        space = self.space(sinusoidal(cells, self.channels))
        time = self.time(sinusoidal((age.to(**like) / self.horizon)[:, None], self.channels))
        return (self.camera(camera) + time)[:, None] + space

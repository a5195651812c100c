"""Puts what was seen before beside what is seen now: aligned by the car's motion, then fused."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from ...kernels import bev_warp
from ..operations import OperationModule
from .grid import BevGrid
from .history import History


@dataclass
class FusionConfig:
    """Settings of a `TemporalFusion`."""

    kind: Literal["off", "present", "concat", "sum", "gate"] = "concat"  # off: no block; present: the block, no history
    mode: Literal["nearest", "bilinear"] = "nearest"  # of the alignment

    @property
    def reads_history(self) -> bool:
        return self.kind in ("concat", "sum", "gate")


class Fused(NamedTuple):
    """Fused features (B, C, H, W), and of `gate` the weight of the present and of each interval, (B, 1 + K, H, W)."""

    features: torch.Tensor
    weights: torch.Tensor | None


class TemporalFusion(OperationModule):
    """Aligns the history to the present and fuses both in a VGG block: twice a 3 × 3 convolution and a ReLU.

    `concat` gives the block all maps side by side, `sum` their mean, `gate` their mean with weights that each cell
    chooses. Beside the maps goes how far each of them was seen: 1 where it is there, 0 where a frame is missing or did
    not reach. The block begins as the identity on the present (whose features are not negative), so training begins
    with what the network without time says.

    Args:
        grid: of the features.
        channels: C.
        intervals: K.
        config: see `FusionConfig`.
    """

    def __init__(self, grid: BevGrid, channels: int, intervals: int, config: FusionConfig):
        super().__init__()
        self.grid, self.config = grid, config
        maps = 1 + (intervals if config.reads_history else 0)
        inputs = maps * channels if config.kind == "concat" else channels
        seen = maps if config.reads_history else 0
        self.block = nn.ModuleList([_identity(inputs + seen, channels), _identity(channels, channels)])
        self.gate = nn.Conv2d(maps * (channels + 1), maps, 3, padding=1) if config.kind == "gate" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            self.gate.bias.data = torch.tensor([4.0] + [0.0] * intervals)  # at first the present, above all

    def forward(self, present: torch.Tensor, seen: torch.Tensor, history: History | None) -> Fused:
        """Fuses the present (B, C, H, W) with the history.

        Args:
            present: not negative; gets gradients.
            seen: (B, 1, H, W), 1 where a sensor sees the cell now.
            history: of the same size; None where the kind reads none.
        """
        kind = self.config.kind
        if not self.config.reads_history:
            return Fused(self._vgg(present), None)
        past, past_seen = self.align(history)
        maps = torch.cat([present[:, None], past.to(present.dtype)], dim=1)  # (B, 1 + K, C, H, W)
        seen = torch.cat([seen.to(present.dtype), past_seen.to(present.dtype)], dim=1)  # (B, 1 + K, H, W)
        weights = None
        if kind == "concat":
            mixed = maps.flatten(1, 2)
        elif kind == "sum":
            mixed = (maps * seen[:, :, None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        else:
            logits = self.gate(torch.cat([maps.flatten(1, 2), seen], dim=1)).float()
            hidden = torch.finfo(logits.dtype).min
            weights = logits.masked_fill(seen < 0.5, hidden).softmax(dim=1).to(maps.dtype)
            mixed = (maps * weights[:, :, None]).sum(1)
        return Fused(self._vgg(torch.cat([mixed, seen], dim=1)), weights)

    def align(self, history: History) -> tuple[torch.Tensor, torch.Tensor]:
        """Brings past maps into the present ego frame: (B, K, C, H, W), and (B, K, H, W) how far each cell was seen."""
        batch, count = history.found.shape
        transform = self.grid.warp(history.then_T_now).to(history.features.device)
        options = dict(mode=self.config.mode, backend=self.backend)
        maps, coverage = bev_warp(history.features.flatten(0, 1), transform.flatten(0, 1), **options)
        found = history.found.to(coverage).flatten()[:, None, None]
        return maps.unflatten(0, (batch, count)), (coverage * found).unflatten(0, (batch, count))

    def _vgg(self, x):
        for layer in self.block:
            x = layer(x).relu()
        return x


def _identity(inputs, channels):
    """A 3 × 3 convolution that hands on the first `channels` maps as they are and reads nothing else yet."""
    layer = nn.Conv2d(inputs, channels, 3, padding=1)
    nn.init.dirac_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

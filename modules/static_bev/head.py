"""What stands on the ground for good: lane markings, road areas, and things with a place and a direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..centres import PRIOR_BIAS
from ..settings import Count, Share
from .grid import BevGrid
from .rotated import rotated_nms

LANE_CLASSES = (
    "SolidLine", "DoubleSolidLine", "DashedLine", "DoubleDashedLine", "RightSolidLeftDashed", "LeftSolidRightDashed",
    "WideSolidLine", "WideDashedLine", "ShortDashedLine",
)  # fmt: skip
ROAD_CLASSES = ("Wall", "Curb", "Lane", "Road")
INSTANCE_CLASSES = ("SpeedBump", "GroundSigns", "ParkingSlot")
DIRECTED = ("GroundSigns",)  # whose angle counts modulo a whole turn; that of the others modulo half of one


@dataclass
class HeadConfig:
    """Settings of a `StaticSegHead`."""

    lanes: tuple[str, ...] = LANE_CLASSES
    road: tuple[str, ...] = ROAD_CLASSES
    instances: tuple[str, ...] = INSTANCE_CLASSES
    channels: Count = 128  # of the maps at the labels' size
    scales: Count = 1  # of the U-Net that reads the features, each half the size of the last; 1 = one convolution
    layers: Count = 5  # convolutions before the lanes and before the road
    best: Count = 100  # instances kept of a sample
    nms: Share = 0.2  # overlap from which on the worse of two instances of a class goes
    threshold: Share = 0.1  # score below which an instance is none

    def validate(self) -> None:
        for name in ("lanes", "road", "instances"):
            classes = getattr(self, name)
            if not classes or len(set(classes)) != len(classes):
                raise ValueError(f"{name} is {classes}, needs at least one class, none twice")


class HeadOutput(NamedTuple):
    """Maps at the labels' size; probabilities are their sigmoids."""

    lanes: torch.Tensor  # (B, lanes, rows, columns) logits
    road: torch.Tensor  # (B, road classes, rows, columns) logits
    heat: torch.Tensor  # (B, instance classes, rows, columns) logits of being an instance's centre
    boxes: torch.Tensor  # (B, 6, rows, columns): offset of the centre in cells (u, v), log length, log width, sin, cos


class Instances(NamedTuple):
    """Instances of one sample, the surest first."""

    boxes: torch.Tensor  # (K, 6) float32: x, y, length, width in metres, angle in radians, class
    scores: torch.Tensor  # (K,)


class StaticSegHead(nn.Module):
    """Segments lanes and road, and finds instances by their centres (Zhou et al. 2019, "CenterNet").

    Args:
        grid: of the labels.
        in_channels: C of the features.
        upsample: label cells along the side of a feature cell.
        config: see `HeadConfig`.
    """

    def __init__(self, grid: BevGrid, in_channels: int, upsample: int, config: HeadConfig):
        super().__init__()
        self.grid, self.config, self.upsample = grid, config, upsample
        width = config.channels
        self.stem = _block(in_channels, width) if config.scales == 1 else UNet(in_channels, width, config.scales)
        self.sharpen = _block(width, width)  # after the upsampling
        self.lanes = self._branch(width, len(config.lanes), config.layers)
        self.road = self._branch(width, len(config.road), config.layers)
        self.heat = self._branch(width, len(config.instances), 1)
        self.boxes = self._branch(width, 6, 1)
        for branch in (self.lanes, self.road, self.heat):
            nn.init.constant_(branch[-1].bias, PRIOR_BIAS)
        turns = [1.0 if name in DIRECTED else 2.0 for name in config.instances]
        self.register_buffer("turns", torch.tensor(turns), persistent=False)  # the angle is learned times this

    @staticmethod
    def _branch(width, out, layers):
        return nn.Sequential(*(_block(width, width) for _ in range(layers)), nn.Conv2d(width, out, 1))

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Reads features (B, in_channels, h, w)."""
        x = self.stem(features)
        if self.upsample > 1:
            x = F.interpolate(x, scale_factor=self.upsample, mode="bilinear", align_corners=False)
        x = self.sharpen(x)
        return HeadOutput(*(branch(x).float() for branch in (self.lanes, self.road, self.heat, self.boxes)))

    @torch.no_grad()
    def decode(self, output: HeadOutput) -> list[Instances]:
        """The instances of each sample: peaks of the heat, those that overlap with a surer one left out."""
        heat = output.heat.sigmoid()
        peaks = torch.where(F.max_pool2d(heat, 3, stride=1, padding=1) == heat, heat, 0.0)
        found = []
        for peak, boxes in zip(peaks, output.boxes):
            scores, places = peak.flatten().topk(min(self.config.best, peak.numel()))
            places = places[scores > self.config.threshold]
            scores = scores[scores > self.config.threshold]
            label, v, u = torch.unravel_index(places, peak.shape)
            found.append(self._kept(self._boxes(boxes[:, v, u].T, u, v, label), scores))
        return found

    def _boxes(self, rows, u, v, label):
        """(N, 6) of the map's values (N, 6) at the cells (u, v)."""
        centre = self.grid.points(torch.stack([u, v], dim=-1) + rows[:, :2])
        size = rows[:, 2:4].clamp(-5, 5).exp()
        angle = torch.atan2(rows[:, 4], rows[:, 5]) / self.turns[label]
        return torch.cat([centre, size, angle[:, None], label[:, None].to(centre)], dim=1)

    def _kept(self, boxes, scores):
        kept = [rotated_nms(boxes[own, :5], scores[own], self.config.nms) for own in self._by_class(boxes)]
        places = torch.cat([own[keep] for own, keep in zip(self._by_class(boxes), kept)])
        places = places[scores[places].argsort(descending=True, stable=True)]
        return Instances(boxes[places], scores[places])

    def _by_class(self, boxes):
        return [torch.nonzero(boxes[:, 5] == label)[:, 0] for label in range(len(self.config.instances))]


class UNet(nn.Module):
    """Looks at a map at several scales (Ronneberger et al. 2015): what one cell cannot know, its surroundings tell.

    Args:
        in_channels: C of the map.
        width: C of every scale.
        scales: how many, each half the size of the last.
    """

    def __init__(self, in_channels: int, width: int, scales: int):
        super().__init__()
        self.first = _block(in_channels, width)
        self.down = nn.ModuleList(
            nn.Sequential(_block(width, width, stride=2), _block(width, width)) for _ in range(scales - 1)
        )
        self.up = nn.ModuleList(_block(2 * width, width) for _ in range(scales - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) → (B, width, H, W)."""
        scales = [self.first(x)]
        for layer in self.down:
            scales.append(layer(scales[-1]))
        x = scales.pop()
        for layer in self.up:
            finer = scales.pop()
            x = layer(torch.cat([finer, F.interpolate(x, size=finer.shape[-2:], mode="nearest")], dim=1))
        return x


def padded(found: Sequence[Instances], best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Instances of a batch as the documents have them: boxes (B, best, 6) and scores (B, best), filled with zeros."""
    boxes, scores = (torch.zeros(len(found), best, *rest, device=found[0].boxes.device) for rest in ((6,), ()))
    for row, each in enumerate(found):
        boxes[row, : len(each.boxes)], scores[row, : len(each.boxes)] = each.boxes, each.scores
    return boxes, scores


def _block(before, after, stride=1):
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

"""Backbone and pyramid, trained to say how far away each cell is, and on request what object is in it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import PyramidConfig, ResNetFPN
from ..settings import Count, Positive

_NOTHING = 0.1  # what a cell without an object counts in the loss


@dataclass
class DepthConfig:
    """Settings of a `DepthNetwork`."""

    channels: Count = 256  # of every scale
    backbone: PyramidConfig = field(default_factory=lambda: PyramidConfig(frozen_stages=-1, norm_eval=False))
    bins: Count = 48  # classes of depth, of equal width in its logarithm
    nearest: Positive = 2.0  # metres, where the first bin begins
    farthest: Positive = 60.0  # metres, where the last one ends
    classes: tuple[str, ...] = ()  # of objects and map lines that cells are told too; none = depth alone

    def validate(self) -> None:
        """ValueError where the range is empty."""
        if self.nearest >= self.farthest:
            raise ValueError(f"nearest is {self.nearest} and farthest is {self.farthest}, needs nearest < farthest")

    def build(self) -> "DepthNetwork":
        network = DepthNetwork(ResNetFPN(self.backbone, self.channels), self)
        return network.to(memory_format=torch.channels_last)


@dataclass
class DepthInput:
    """Images of a batch of rigs, and what is known of their depth."""

    images: torch.Tensor  # (B, V, 3, H, W), normalised
    depths: list[torch.Tensor]  # for each stride (B, V, h, w) metres, 0 where nothing is known
    labels: list[
        torch.Tensor
    ]  # for each stride (B, V, h, w) int64, −1 = no object, −2 = unknown; empty without classes


@dataclass
class DepthOutput:
    """What the network says."""

    depths: list[torch.Tensor]  # for each stride (B, V, h, w) metres
    labels: list[torch.Tensor]  # for each stride (B, V, h, w) int64, as in the input
    losses: dict[str, torch.Tensor]  # `depth`, and with classes `objects`: unweighted scalars


class DepthNetwork(nn.Module):
    """Classifies the depth of each cell of each scale (as in Reading et al. 2021, "CaDDN"), one linear head a scale.

    The heads are small on purpose: what they read is what the backbone's features say. So the backbone learns features
    that mean something from images and LiDAR alone, and other networks take them (`backbone.weights`). With classes a
    second head a scale says whose points lie in a cell: boxes teach every cell, not only those that an anchor looks at.

    Args:
        backbone: gives one map for each stride.
        config: see `DepthConfig`.
    """

    def __init__(self, backbone: ResNetFPN, config: DepthConfig):
        super().__init__()
        self.backbone, self.nearest, self.farthest, self.bins = backbone, config.nearest, config.farthest, config.bins
        self.heads = nn.ModuleList(nn.Conv2d(config.channels, config.bins, 1) for _ in backbone.strides)
        self.classes = len(config.classes)
        if self.classes:
            self.object_heads = nn.ModuleList(nn.Conv2d(config.channels, 1 + self.classes, 1) for _ in backbone.strides)
        edges = torch.linspace(torch.tensor(self.nearest).log(), torch.tensor(self.farthest).log(), config.bins + 1)
        self.register_buffer("centres", (edges[1:] + edges[:-1]) / 2, persistent=False)  # logarithms of metres

    def forward(self, batch: DepthInput) -> DepthOutput:
        """Says the depth of every cell: the mean of its bins in the logarithm.

        The loss is the bins' cross entropy where the depth is known and in range, the mean over the scales; that of
        objects the cross entropy of the cells in which a point lies, where one without an object counts a tenth.
        """
        flat = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        depths, losses = [], []
        pyramid = self.backbone(flat)
        for maps, head, true in zip(pyramid, self.heads, batch.depths, strict=True):
            scores = head(maps).float()  # (B·V, bins, h, w)
            mean = torch.einsum("ndhw,d->nhw", scores.softmax(1), self.centres)
            depths.append(mean.exp().unflatten(0, batch.images.shape[:2]))
            losses.append(self._loss(scores, true.flatten(0, 1)))
        found = DepthOutput(depths, [], dict(depth=torch.stack(losses).mean()))
        if self.classes:
            self._add_objects(found, pyramid, batch)
        return found

    def _add_objects(self, found, pyramid, batch):
        weight, losses = self.centres.new_ones(1 + self.classes), []
        weight[0] = _NOTHING
        for maps, head, true in zip(pyramid, self.object_heads, batch.labels, strict=True):
            scores = head(maps).float()  # (B·V, 1 + classes, h, w)
            found.labels.append(scores.argmax(1).unflatten(0, batch.images.shape[:2]) - 1)
            label = true.flatten(0, 1) + 1
            known = (label >= 0).any()
            losses.append(F.cross_entropy(scores, label, weight, ignore_index=-1) if known else scores.sum() * 0)
        found.losses["objects"] = torch.stack(losses).mean()

    def _loss(self, scores, true):
        known = self.usable(true)
        place = (true.clamp(min=self.nearest).log() - self.centres[0]) / (self.centres[-1] - self.centres[0])
        label = (place * (self.bins - 1)).round().long().clamp(0, self.bins - 1)
        label = torch.where(known, label, -1)
        if not known.any():
            return scores.sum() * 0
        return F.cross_entropy(scores, label, ignore_index=-1)

    def usable(self, depths: torch.Tensor) -> torch.Tensor:
        """Says which depths (metres, any shape) count: those that are known and in range, bool."""
        return (depths >= self.nearest) & (depths <= self.farthest)

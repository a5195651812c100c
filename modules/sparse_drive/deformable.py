"""How an instance looks at the images: at its keypoints, in every camera and scale, weighted by itself."""

from dataclasses import dataclass

import torch
from torch import nn

from ...kernels import deformable_aggregation
from ...kernels.runtime.checks import Shapes
from ..projection import project
from ..settings import Count, Momentum
from .layers import full_precision, mlp, widened


@dataclass
class DeformableConfig:
    groups: Count = 8  # of channels that share a sampling weight
    keypoint_dropout: Momentum = 0.15  # share of the keypoints that training leaves out, by camera
    renormalise: bool = True  # weights sum to one over the cameras that are there; False, as upstream: over all
    half_pixel: bool = True  # projections have pixel centres at integers; False, as upstream: at halves
    backend: str | None = None  # of `deformable_aggregation`


@dataclass(frozen=True, eq=False)
class Views:
    """What the cameras of a batch see at one moment."""

    maps: list[torch.Tensor]  # for each scale (B, V, C, h, w)
    projection: torch.Tensor  # (B, V, 4, 4) float32, ego points (x, y, z, 1) to (u·depth, v·depth, depth, 1), pixels
    image_size: tuple[int, int]  # height, width
    visible: torch.Tensor | None = None  # (B, V) bool, False = must not be read; None = all are there

    def __post_init__(self):
        shapes = Shapes("Views")
        for level, maps in enumerate(self.maps):
            height, width = shapes.bind(f"maps[{level}]", maps, "B", "V", "C", f"h{level}", f"w{level}")[3:]
            if height == 0 or width == 0 or self.image_size[0] % height or self.image_size[1] % width:
                got = f"maps[{level}] has {height} × {width} cells for an image of {self.image_size}"
                raise ValueError(f"Views: {got}, needs divisors; pad the images to a multiple of the coarsest stride")
        shapes.bind("projection", self.projection, "B", "V", 4, 4)
        if self.visible is not None:
            shapes.bind("visible", self.visible, "B", "V")


class DeformableBlock(nn.Module):
    """Samples the maps at the keypoints of each instance and puts what it finds beside the instance's feature.

    Args:
        channels: C of instances and maps.
        levels: number of scales.
        keypoints: module that gives them; its `count` says how many.
        config: see `DeformableConfig`.
    """

    def __init__(self, channels: int, levels: int, keypoints: nn.Module, config: DeformableConfig):
        super().__init__()
        self.levels, self.keypoints, self.config = levels, keypoints, config
        self.camera = mlp(channels, linears=1, norms=2, inputs=12)
        self.weights = nn.Linear(channels, config.groups * levels * keypoints.count)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, feature: torch.Tensor, anchor: torch.Tensor, embedding: torch.Tensor, views: Views
    ) -> torch.Tensor:
        """feature, embedding (B, N, C), anchor (B, N, numbers) → (B, N, 2C): what was found, then the feature."""
        points = project(self.keypoints(anchor, feature), views.projection, views.image_size, self.config.half_pixel)
        weights = self._weights(feature + embedding, views)
        found = deformable_aggregation(views.maps, points, weights, visible=views.visible, backend=self.config.backend)
        return torch.cat([self.out(found.to(feature.dtype)), feature], dim=-1)

    def _weights(self, located, views):
        """(B, N, P, V, levels, groups), softmax over points, cameras and levels."""
        with full_precision(views.projection):
            camera = self.camera(views.projection[:, :, :3].flatten(2))  # (B, V, C)
        logits = self.weights(located[:, :, None] + camera[:, None].to(located.dtype))
        (logits,) = widened(logits)
        logits = logits.unflatten(-1, (self.levels, self.keypoints.count, self.config.groups))  # (B, N, V, L, P, G)
        hidden = None if views.visible is None else ~views.visible[:, None, :, None, None, None]
        if hidden is not None and self.config.renormalise:
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        weights = logits.flatten(2, 4).softmax(dim=2).view_as(logits)
        if self.training and self.config.keypoint_dropout > 0:
            kept = torch.rand_like(weights[:, :, :, :1, :, :1]) > self.config.keypoint_dropout
            weights = weights * kept / (1 - self.config.keypoint_dropout)
        return weights.permute(0, 1, 4, 2, 3, 5)

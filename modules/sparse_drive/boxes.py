"""Anchors that are boxes: what their numbers mean, how they are embedded, sampled, refined and carried through time.

A box is eleven numbers: x, y, z of the centre (metres), log length, log width, log height, sin yaw, cos yaw, vx, vy, vz
(m/s), in the ego frame of its moment. (Upstream calls the sizes width, length and height, but reads them like this.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .layers import PRIOR_BIAS, full_precision, mlp, widened

CENTRE, SIZE, YAW, VELOCITY = slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 11)
NUMBERS = 11
FIXED_KEYPOINTS = (  # in sizes from the centre: it, and places just inside the six faces
    (0.0, 0.0, 0.0),
    (0.45, 0.0, 0.0),
    (-0.45, 0.0, 0.0),
    (0.0, 0.45, 0.0),
    (0.0, -0.45, 0.0),
    (0.0, 0.0, 0.45),
    (0.0, 0.0, -0.45),
)


@dataclass
class Refined:
    """What a refinement says of N anchors."""

    anchor: torch.Tensor  # (B, N, numbers) float32
    logits: torch.Tensor  # (B, N, classes) float32
    quality: torch.Tensor | None  # (B, N, 2) float32, logits of centredness and of the yaw's direction; boxes only


def encode(boxes: torch.Tensor) -> torch.Tensor:
    """(…, 9 or 10) x, y, z, length, width, height, yaw, vx, vy[, vz] → (…, 10 or 11) numbers as above."""
    yaw = boxes[..., 6:7]
    return torch.cat([boxes[..., :3], boxes[..., 3:6].log(), yaw.sin(), yaw.cos(), boxes[..., 7:]], dim=-1)


def decode(code: torch.Tensor) -> torch.Tensor:
    """(…, 11) → (…, 10): x, y, z, length, width, height (metres), yaw in [−π, π], vx, vy, vz."""
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., CENTRE], code[..., SIZE].exp(), yaw, code[..., VELOCITY]], dim=-1)


def move(anchor: torch.Tensor, now_T_then: torch.Tensor, interval: torch.Tensor | None = None) -> torch.Tensor:
    """Boxes of another moment as they stand now: driven on for `interval`, then seen from the present ego frame.

    Args:
        anchor: (B, N, 11).
        now_T_then: (B, 4, 4), ego points of that moment to the present ego frame.
        interval: (B,) seconds since then; None = where they stood then.
    """
    rotation, translation = now_T_then[:, None, :3, :3], now_T_then[:, None, :3, 3]
    centre, velocity = anchor[..., CENTRE], anchor[..., VELOCITY]
    if interval is not None:
        centre = centre + velocity * interval[:, None, None]
    heading = torch.cat([anchor[..., 7:8], anchor[..., 6:7]], dim=-1)  # cos, sin
    heading = _rotate(rotation[..., :2, :2], heading).flip(-1)
    centre = _rotate(rotation, centre) + translation
    return torch.cat([centre, anchor[..., SIZE], heading, _rotate(rotation, velocity)], dim=-1)


def _rotate(rotation, vectors):
    """Without a matrix product, whose TensorFloat-32 would move a distant box by centimetres."""
    return (rotation * vectors[..., None, :]).sum(-1)


class BoxEncoder(nn.Module):
    """Embeds boxes: position, size, heading and velocity by networks of their own, side by side."""

    def __init__(self, channels: int):
        super().__init__()
        if channels % 8:
            raise ValueError(f"BoxEncoder: channels is {channels}, needs a multiple of 8")
        self.position = mlp(channels // 2, linears=1, norms=4, inputs=3)
        self.size = mlp(channels // 8, linears=1, norms=4, inputs=3)
        self.yaw = mlp(channels // 8, linears=1, norms=4, inputs=2)
        self.velocity = mlp(channels // 4, linears=1, norms=4, inputs=3)

    def forward(self, anchor: torch.Tensor) -> torch.Tensor:
        """(…, 11) → (…, C), in the anchor's precision."""
        parts = ((self.position, CENTRE), (self.size, SIZE), (self.yaw, YAW), (self.velocity, VELOCITY))
        with full_precision(anchor):
            return torch.cat([part(anchor[..., numbers]) for part, numbers in parts], dim=-1)


class BoxKeypoints(nn.Module):
    """Where a box is looked at: seven fixed places, and some that its instance chooses inside it."""

    def __init__(self, channels: int, learned: int):
        super().__init__()
        self.register_buffer("fixed", torch.tensor(FIXED_KEYPOINTS))
        self.count = len(FIXED_KEYPOINTS) + learned
        self.learned = nn.Linear(channels, 3 * learned)
        nn.init.xavier_uniform_(self.learned.weight)
        nn.init.zeros_(self.learned.bias)

    def forward(self, anchor: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """anchor (B, N, 11), feature (B, N, C) → (B, N, keypoints, 3) metres, ego frame."""
        with full_precision(anchor):
            (feature,) = widened(feature)
            chosen = self.learned(feature).unflatten(-1, (-1, 3)).sigmoid() - 0.5
            fixed = self.fixed.expand(*anchor.shape[:2], -1, -1)
            place = torch.cat([fixed, chosen], dim=-2) * anchor[..., None, SIZE].exp()
            x, y, z = place.unbind(-1)
            sin, cos = anchor[..., None, 6], anchor[..., None, 7]
            turned = torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1)
            return turned + anchor[..., None, CENTRE]


class BoxRefinement(nn.Module):
    """Moves boxes and says what they are: the class by the instance's feature alone, the rest by where it is too."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.offset = mlp(channels, linears=2, norms=2).append(nn.Linear(channels, NUMBERS))
        self.scale = nn.Parameter(torch.ones(NUMBERS))
        self.classes = mlp(channels, linears=1, norms=2).append(nn.Linear(channels, classes))
        self.quality = mlp(channels, linears=1, norms=2).append(nn.Linear(channels, 2))
        nn.init.constant_(self.classes[-1].bias, PRIOR_BIAS)

    def forward(
        self, feature: torch.Tensor, anchor: torch.Tensor, embedding: torch.Tensor, interval: torch.Tensor
    ) -> Refined:
        """feature, embedding (B, N, C), anchor (B, N, 11), interval (B,) seconds since the moment before, by which what
        is said of the velocity is divided."""
        with full_precision(anchor):
            feature, embedding = widened(feature, embedding)
            offset = self.offset(feature + embedding) * self.scale
            velocity = offset[..., VELOCITY] / interval[:, None, None]
            refined = anchor + torch.cat([offset[..., :8], velocity], dim=-1)
            return Refined(refined, self.classes(feature), self.quality(feature + embedding))


def cosine_of_yaw(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the angle between the headings of encoded boxes (…, ≥ 8), whatever the length of (sin, cos)."""
    return F.cosine_similarity(a[..., YAW], b[..., YAW], dim=-1)

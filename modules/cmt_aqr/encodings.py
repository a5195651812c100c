"""Where tokens and queries are, as vectors of one space: the coordinate encodings of CMT (Yan et al. 2023)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..maps_layout import MapLayout, check_projection, project_points
from ..positions import sinusoidal

Encoding = Literal["metric", "cmt"]
_EDGE = 1e-5  # how near the edge of the range upstream lets a reference point come


class CoordinateEncoding(nn.Module):
    """The position encodings of the decoder's memory and of its queries, from two shared networks.

    A BEV cell, and the x and y of a query, pass as sines and cosines through `bev_embedding`. A camera's cell, and the
    place where a camera sees a query, pass through `rv_embedding` as the points at `depths` distances on their ray. So
    a query resembles the tokens that may show it, on every map. Computed in float32 under autocast too, the geometry in
    float64.

    "cmt" is what upstream's weights were trained with: wavelengths from the whole range to twice that, all of
    them long: what is near is hard to tell apart; the place of an image cell is its corner; the
    depths stop one step before x_max; a camera sees what is at any depth above 0; no gradient through a query's depth.
    "metric" has wavelengths that double, the cells' centres, and depths up to x_max.

    With `heads`, places are told apart from the first step on, where two networks from random weights give all places
    much the same vector. To what the networks say, which begins at zero, sines and cosines are added: of x and y in the
    channels of the first half of the attention heads, of a ray's direction in those of the others. Their inner
    products are bells round equal places, for either kind of map by itself.

    Args:
        channels: C; even, and with "cmt" a multiple of 4.
        layout: of the maps.
        depths: number of points on a ray, from 1 m to x_max metres in front of the camera in equal steps.
        encoding: "metric" or "cmt".
        heads: of the attention that compares the encodings, each of a multiple of 4 channels; 0 = only the networks.
    """

    def __init__(
        self, channels: int, layout: MapLayout, *, depths: int = 64, encoding: Encoding = "metric", heads: int = 0
    ):
        super().__init__()
        if channels % 2:
            raise ValueError(f"CoordinateEncoding: channels is {channels}, needs an even number")
        if depths < 1:
            raise ValueError(f"CoordinateEncoding: depths is {depths}, needs at least 1")
        if heads and channels % (4 * heads):
            needed = f"a multiple of 4 for each of {heads} heads"
            raise ValueError(f"CoordinateEncoding: channels is {channels}, needs {needed}")
        self.channels, self.layout, self.depths, self.as_cmt = channels, layout, depths, encoding == "cmt"
        self.bev_heads, self.view_heads = (heads + 1) // 2, heads // 2
        self.bev_embedding = _mlp(2 * channels, channels, channels)
        self.rv_embedding = _mlp(3 * depths, 4 * channels, channels)
        if heads:
            for network in (self.bev_embedding, self.rv_embedding):
                nn.init.zeros_(network[-1].weight)
                nn.init.zeros_(network[-1].bias)

    def memory(self, image_T_ego: torch.Tensor) -> torch.Tensor:
        """Encodes the tokens' places, (B, L, C): the BEV map first, then the V camera maps, each row after row.

        Args:
            image_T_ego: (B, V, 3 or 4, 4) float64, see `RigFrame`; image augmentation is part of it.
        """
        check_projection(image_T_ego)
        device = self.bev_embedding[0].weight.device
        with torch.autocast(device.type, enabled=False):
            bev = self._embed_bev(_centres(*self.layout.bev_shape, device))  # (H·W, C)
            origin, ego_T_ray = _cameras(image_T_ego, device)
            height, width = self.layout.view_shape
            size = torch.tensor([width, height], device=device) * self.layout.stride  # pixels
            shift = self.layout.stride / 2 if self.as_cmt else 0.5
            pixels = F.pad(_centres(height, width, device) * size - shift, (0, 1), value=1.0)  # (h·w, 3): u, v, 1
            step = pixels @ ego_T_ray.mT  # (B, V, h·w, 3)
            rays = origin[:, :, None, None] + self._depth(device) * step[..., None, :]
            views = self._embed_rays(rays, step).flatten(1, 2)
        return torch.cat([bev.expand(len(views), -1, -1), views], dim=1)

    def queries(self, points: torch.Tensor, image_T_ego: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Encodes the queries' places, (B, N, C): by x and y, plus once for every camera that sees the point.

        Args:
            points: (B, N, 3) metres, ego frame. Gets gradients. One that is not finite gets zeros.
            image_T_ego: (B, V, 3 or 4, 4) float64.
            cells: (B, N, 1 + V, 2), the points' cells, see `MapLayout.cells`: they say which camera sees which point.
        """
        check_projection(image_T_ego, len(points))
        seen, device = cells[:, :, 1:].isfinite().all(-1), points.device  # seen: (B, N, V)
        with torch.autocast(device.type, enabled=False):
            points = points.double()
            finite = points.isfinite().all(-1, keepdim=True)
            points = torch.where(finite, points, 0.0)
            low, extent = self._range(device)
            places = (points - low) / extent
            if self.as_cmt:
                places = inverse_sigmoid(places).sigmoid()
                points = low + extent * places
            bev = self._embed_bev(places[..., :2])
            u, v, depth = project_points(points, image_T_ego[:, :, :3].to(device)).unbind(-1)
            if self.as_cmt:
                (height, width), stride, depth = self.layout.view_shape, self.layout.stride, depth.detach()
                inside = (u >= 0) & (u < width * stride * depth) & (v >= 0) & (v < height * stride * depth)
                seen = inside & (depth > 0)
            ratio = self._depth(device) / torch.where(seen, depth, 1.0)[..., None, None]  # (B, N, V, D, 1)
            origin = _cameras(image_T_ego, device)[0][:, None]  # (B, 1, V, 3)
            # A ray's points are the query's point moved towards the camera or away from it.
            away = torch.where(seen[..., None], points[:, :, None] - origin, 1.0)
            rays = origin[..., None, :] + ratio * away[..., None, :]
            views = torch.where(seen[..., None], self._embed_rays(rays, away), 0.0).sum(2)
            return torch.where(finite, bev + views, 0.0)

    def _range(self, device):
        """The range's lower corner and its sides, (3,) float64 each, metres."""
        low, high = torch.tensor(self.layout.point_range, dtype=torch.float64, device=device).view(2, 3)
        return low, high - low

    def _depth(self, device):
        """The depths of the points on a ray, (D, 1) metres."""
        steps = self.depths + self.as_cmt
        depths = torch.linspace(1, self.layout.point_range[3], steps, dtype=torch.float64, device=device)
        return depths[: self.depths, None]

    def _embed_bev(self, places):
        """places (…, 2), x and y relative to the range → (…, C)."""
        values = places.to(self.bev_embedding[0].weight.dtype)
        waves = linear_waves(values, self.channels) if self.as_cmt else sinusoidal(values, 2 * self.channels)
        return self.bev_embedding(waves) + self._bells(math.pi * places, self.bev_heads, behind=self.view_heads)

    def _embed_rays(self, rays, away):
        """rays (…, D, 3) metres, ego frame, and their directions (…, 3) of any length → (…, C)."""
        low, extent = self._range(rays.device)
        turn = torch.atan2(away[..., 1], away[..., 0])
        slope = away[..., 2] / away[..., :2].norm(dim=-1).clamp(min=_EDGE)
        phases = torch.stack([turn, 2 * slope], dim=-1)  # whole harmonics of the turn: no seam behind the vehicle
        learned = self.rv_embedding(((rays - low) / extent).flatten(-2).to(self.rv_embedding[0].weight.dtype))
        return learned + self._bells(phases, self.view_heads, before=self.bev_heads)

    def _bells(self, phases, heads, before=0, behind=0):
        """Waves of two phases (…, 2) float64, radians, the same for each of some heads, zeros for those before and
        behind → (…, C), or 0.0 without any heads."""
        if not heads:
            return 0.0
        width = self.channels // (before + heads + behind)
        harmonics = torch.logspace(0, 3, width // 4, base=2, dtype=phases.dtype, device=phases.device).round()
        phases = (phases[..., None] * harmonics).flatten(-2)
        waves = math.sqrt(2) * torch.cat([phases.sin(), phases.cos()], dim=-1)  # of variance 1
        waves = waves.to(self.bev_embedding[0].weight.dtype).repeat(*[1] * (waves.ndim - 1), heads)
        return F.pad(waves, (before * width, behind * width))


def inverse_sigmoid(share: torch.Tensor) -> torch.Tensor:
    """logit(share), at most that of 0.00001 away from 0 and 1; at the edge a gradient of 1 remains."""
    share = share.clamp(0, 1)
    return (share.clamp(min=_EDGE) / (1 - share).clamp(min=_EDGE)).log()


def linear_waves(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Encodes values (…, 2) in [0, 1] as upstream does, (…, 2 · channels): the second value's waves, then the first's.

    Pair k of sine and cosine has the wavelength 1 + 2k / channels, where the usual ladder has powers.
    """
    wavelengths = 1 + torch.arange(0, channels, 2, dtype=values.dtype, device=values.device) / channels
    phases = 2 * math.pi * values.flip(-1)[..., None] / wavelengths
    return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(-3)


def _cameras(image_T_ego, device):
    """The cameras' places (B, V, 3), and (B, V, 3, 3) from (u, v, 1) to the step for one metre of depth."""
    ego_T_ray = torch.linalg.inv(image_T_ego[:, :, :3, :3])
    origin = -(ego_T_ray @ image_T_ego[:, :, :3, 3:])[..., 0]
    return origin.to(device), ego_T_ray.to(device)


def _mlp(in_channels, hidden, channels):
    return nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def _centres(height, width, device):
    """The cells' centres (x, y) relative to the map's sides, (H·W, 2) float64."""
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64, device=device) + 0.5) / width
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)

"""Where tokens and queries are, as vectors of one space: the coordinate encodings of CMT (Yan et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..maps_layout import MapLayout, check_projection, project_points
from ..positions import sinusoidal


class CoordinateEncoding(nn.Module):
    """The position encodings of the decoder's memory and of its queries, from two shared networks.

    A BEV cell, and the x and y of a query, pass as sines and cosines through `bev_embedding`. A camera's cell, and the
    place where a camera sees a query, pass through `rv_embedding` as the points at `depths` distances on their ray. So
    a query resembles the tokens that may show it, on every map. Computed in float32 under autocast too, the geometry in
    float64.

    Args:
        channels: C; even.
        layout: of the maps.
        depths: number of points on a ray, from 1 m to x_max metres in front of the camera in equal steps.
    """

    def __init__(self, channels: int, layout: MapLayout, *, depths: int = 64):
        super().__init__()
        if channels % 2:
            raise ValueError(f"CoordinateEncoding: channels is {channels}, needs an even number")
        if depths < 1:
            raise ValueError(f"CoordinateEncoding: depths is {depths}, needs at least 1")
        self.channels, self.layout, self.depths = channels, layout, depths
        self.bev_embedding = _mlp(2 * channels, channels, channels)
        self.rv_embedding = _mlp(3 * depths, 4 * channels, channels)

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
            pixels = F.pad(_centres(height, width, device) * size - 0.5, (0, 1), value=1.0)  # (h·w, 3): u, v, 1
            step = pixels @ ego_T_ray.mT  # (B, V, h·w, 3)
            rays = origin[:, :, None, None] + self._depth(device) * step[..., None, :]
            views = self._embed_rays(rays).flatten(1, 2)
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
            bev = self._embed_bev(((points - low) / extent)[..., :2])
            depth = project_points(points, image_T_ego[:, :, :3].to(device))[..., 2]
            ratio = self._depth(device) / torch.where(seen, depth, 1.0)[..., None, None]  # (B, N, V, D, 1)
            origin = _cameras(image_T_ego, device)[0][:, None]  # (B, 1, V, 3)
            # A ray's points are the query's point moved towards the camera or away from it.
            rays = origin[..., None, :] + ratio * (points[:, :, None] - origin)[..., None, :]
            views = torch.where(seen[..., None], self._embed_rays(rays), 0.0).sum(2)
            return torch.where(finite, bev + views, 0.0)

    def _range(self, device):
        """The range's lower corner and its sides, (3,) float64 each, metres."""
        low, high = torch.tensor(self.layout.point_range, dtype=torch.float64, device=device).view(2, 3)
        return low, high - low

    def _depth(self, device):
        """The depths of the points on a ray, (D, 1) metres."""
        return torch.linspace(1, self.layout.point_range[3], self.depths, dtype=torch.float64, device=device)[:, None]

    def _embed_bev(self, places):
        """places (…, 2), x and y relative to the range → (…, C)."""
        return self.bev_embedding(sinusoidal(places.to(self.bev_embedding[0].weight.dtype), 2 * self.channels))

    def _embed_rays(self, rays):
        """rays (…, D, 3) metres, ego frame → (…, C)."""
        low, extent = self._range(rays.device)
        return self.rv_embedding(((rays - low) / extent).flatten(-2).to(self.rv_embedding[0].weight.dtype))


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

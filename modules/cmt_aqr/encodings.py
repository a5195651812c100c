"""Where tokens and queries are, as vectors of one space: the coordinate encodings of CMT (Yan et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..positions import sinusoidal
from ..rig import cell_T_image

POINT_RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)  # x_min, y_min, z_min, x_max, y_max, z_max, metres, ego frame
MIN_DEPTH = 0.1  # metres


def bev_cells(points: torch.Tensor, shape: tuple[int, int], point_range: tuple[float, ...]) -> torch.Tensor:
    """Where points lie on the bird's-eye-view map of `point_range`.

    Args:
        points: (B, N, 3) metres, ego frame. Gets no gradient.
        shape: (H, W) of the map; rows run along +y, columns along +x.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres.

    Returns:
        (B, N, 2) float32 cells (column, row), integers at cell centres; NaN for a point beside the map (whatever its
        height) or not finite. Formed in float64, narrowed last.
    """
    points = points.detach().double()
    columns, rows = (
        (points[..., axis] - point_range[axis]) * (cells / (point_range[axis + 3] - point_range[axis])) - 0.5
        for axis, cells in ((0, shape[1]), (1, shape[0]))
    )
    finite = points.isfinite().all(-1, keepdim=True)
    return _on_the_map(torch.stack([columns, rows], dim=-1), shape, finite)


def camera_cells(points: torch.Tensor, image_T_ego: torch.Tensor, shape: tuple[int, int], stride: int) -> torch.Tensor:
    """Where points appear on every camera's feature map.

    Args:
        points: (B, N, 3) metres, ego frame. Gets no gradient.
        image_T_ego: (B, V, 3 or 4, 4) float64, see `RigFrame`.
        shape: (H, W) of the maps.
        stride: image pixels per cell.

    Returns:
        (B, N, V, 2) float32 cells (column, row), integers at cell centres; NaN where camera v does not see the point:
        beside the map, at most 0.1 m in front of the camera, or not finite. Formed in float64, narrowed last.

    Raises:
        ValueError: the shapes of `points` and `image_T_ego` do not fit.
        TypeError: `image_T_ego` is not float64.
    """
    _validate(image_T_ego, points)
    projection = image_T_ego[:, :, :3].to(points.device)
    cells_T_image = cell_T_image(stride).to(points.device)
    x, y, depth = _project(points.detach().double(), cells_T_image @ projection).unbind(-1)
    return _on_the_map(torch.stack([x / depth, y / depth], dim=-1), shape, (depth > MIN_DEPTH)[..., None])


def _project(points, projection):
    """points (B, N, 3), projection (B, V, 3, 4) → (B, N, V, 3)."""
    return torch.einsum("bvij,bnj->bnvi", projection[..., :3], points) + projection[:, None, :, :, 3]


def _on_the_map(cells, shape, valid):
    """Tested after the narrowing, so that no cell is rounded off the map."""
    cells = cells.float()
    size = cells.new_tensor([shape[1], shape[0]])
    valid = valid & ((cells >= -0.5) & (cells < size - 0.5)).all(-1, keepdim=True)
    return torch.where(valid, cells, torch.nan)


def _validate(image_T_ego, points=None):
    if points is not None and (points.ndim != 3 or points.shape[-1] != 3):
        raise ValueError(f"the points have shape {tuple(points.shape)}, need (B, N, 3)")
    shape, batch = tuple(image_T_ego.shape), "B" if points is None else len(points)
    if len(shape) != 4 or batch not in ("B", shape[0]) or shape[2] not in (3, 4) or shape[3] != 4:
        raise ValueError(f"image_T_ego has shape {shape}, needs ({batch}, V, 3 or 4, 4)")
    if image_T_ego.dtype != torch.float64:
        dtype = str(image_T_ego.dtype).removeprefix("torch.")
        raise TypeError(f"image_T_ego is {dtype}, needs float64 (poses lose centimetres in float32)")


class CoordinateEncoding(nn.Module):
    """The position encodings of the decoder's memory and of its queries, from two shared networks.

    A BEV cell, and the x and y of a query, pass as sines and cosines through `bev_embedding`. A camera's cell, and the
    place where a camera sees a query, pass through `rv_embedding` as the points at `depths` distances on their ray. So
    a query resembles the tokens that may show it, on every map. Computed in float32 under autocast too, the geometry in
    float64.

    Args:
        channels: C; even.
        bev_feature_shape: (H, W) of the BEV map.
        pers_feature_shape: (V, H, W) of the camera maps.
        stride: image pixels per cell of the camera maps.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres, ego frame; spans the BEV map.
        depths: number of points on a ray, from 1 m to x_max metres in front of the camera in equal steps.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        bev_feature_shape: tuple[int, int] = (128, 128),
        pers_feature_shape: tuple[int, int, int] = (6, 20, 50),
        stride: int = 16,
        point_range: tuple[float, ...] = POINT_RANGE,
        depths: int = 64,
    ):
        super().__init__()
        if channels % 2:
            raise ValueError(f"CoordinateEncoding: channels is {channels}, needs an even number")
        if depths < 1:
            raise ValueError(f"CoordinateEncoding: depths is {depths}, needs at least 1")
        self.channels, self.stride, self.depths = channels, stride, depths
        self.bev_shape, self.camera_shape = tuple(bev_feature_shape), tuple(pers_feature_shape[1:])
        self.point_range = tuple(point_range)
        self.bev_embedding = _mlp(2 * channels, channels, channels)
        self.rv_embedding = _mlp(3 * depths, 4 * channels, channels)

    def memory(self, image_T_ego: torch.Tensor) -> torch.Tensor:
        """The tokens' encodings, (B, L, C): the BEV map first, then the V camera maps, each row after row.

        Args:
            image_T_ego: (B, V, 3 or 4, 4) float64, see `RigFrame`; image augmentation is part of it.
        """
        _validate(image_T_ego)
        device = self.bev_embedding[0].weight.device
        with torch.autocast(device.type, enabled=False):
            bev = self._embed_bev(_centres(*self.bev_shape, device))  # (H·W, C)
            origin, ego_T_ray = _cameras(image_T_ego, device)
            height, width = self.camera_shape
            size = torch.tensor([width, height], device=device) * self.stride  # pixels
            pixels = F.pad(_centres(height, width, device) * size - 0.5, (0, 1), value=1.0)  # (h·w, 3): u, v, 1
            step = pixels @ ego_T_ray.mT  # (B, V, h·w, 3)
            rays = origin[:, :, None, None] + self._depth(device) * step[..., None, :]
            views = self._embed_rays(rays).flatten(1, 2)
        return torch.cat([bev.expand(len(views), -1, -1), views], dim=1)

    def queries(self, reference: torch.Tensor, image_T_ego: torch.Tensor) -> torch.Tensor:
        """The queries' encodings, (B, N, C): by x and y, plus one for every camera that sees the reference point.

        Args:
            reference: (B, N, 3) metres, ego frame. Gets gradients. One that is not finite gets zeros.
            image_T_ego: (B, V, 3 or 4, 4) float64.
        """
        seen = camera_cells(reference, image_T_ego, self.camera_shape, self.stride).isfinite().all(-1)  # (B, N, V)
        device = reference.device
        with torch.autocast(device.type, enabled=False):
            points = reference.double()
            finite = points.isfinite().all(-1, keepdim=True)
            points = torch.where(finite, points, 0.0)
            low, extent = self._range(device)
            bev = self._embed_bev(((points - low) / extent)[..., :2])
            depth = _project(points, image_T_ego[:, :, :3].to(device))[..., 2]
            ratio = self._depth(device) / torch.where(seen, depth, 1.0)[..., None, None]  # (B, N, V, D, 1)
            origin = _cameras(image_T_ego, device)[0][:, None]  # (B, 1, V, 3)
            # A ray's points are the reference point moved towards the camera or away from it.
            rays = origin[..., None, :] + ratio * (points[:, :, None] - origin)[..., None, :]
            views = torch.where(seen[..., None], self._embed_rays(rays), 0.0).sum(2)
            return torch.where(finite, bev + views, 0.0)

    def _range(self, device):
        """The range's lower corner and its sides, (3,) each, metres."""
        low, high = torch.tensor(self.point_range, dtype=torch.float64, device=device).view(2, 3)
        return low, high - low

    def _depth(self, device):
        """(D, 1) metres."""
        return torch.linspace(1, self.point_range[3], self.depths, dtype=torch.float64, device=device)[:, None]

    def _embed_bev(self, places):
        """places (…, 2), x and y relative to the range."""
        return self.bev_embedding(sinusoidal(places.to(self.bev_embedding[0].weight.dtype), 2 * self.channels))

    def _embed_rays(self, rays):
        """rays (…, D, 3) metres, ego frame."""
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
    """(H·W, 2) float64: the cells' centres (x, y) relative to the map's sides."""
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64, device=device) + 0.5) / width
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)
